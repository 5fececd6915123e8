"""What `docs/privacy.md` says is kept, against what is."""

from __future__ import annotations

import inspect
import re
import struct
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import byte_tokenizer, tiny_model

from ouroboros_llm import DecodingOptions, Ouroboros
from ouroboros_llm.decoding.decoder import PROMPT_POSITIONS
from ouroboros_llm.drafting import cached_answer as answers
from ouroboros_llm.drafting import phrases
from ouroboros_llm.drafting import token_recycling as recycling
from ouroboros_llm.phrase_pool import opening as sources
from ouroboros_llm.phrase_pool.base import KEPT_ANSWERS, run_key
from ouroboros_llm.phrase_pool.memory import MemoryPool, MemorySource
from ouroboros_llm.sessions.prefix_cache import KV_BYTES
from ouroboros_llm.sessions.session import SessionStore
from ouroboros_storage import PhraseStore, StoredNote, StoredRun, buffer, pools
from ouroboros_storage.cli import pool

PAGE = " ".join((Path(__file__).parent.parent / "docs" / "privacy.md").read_text(encoding="utf-8").split())
FIRST, LENGTH = 107, 60
PROMPT = list(range(FIRST, FIRST + LENGTH))
"""Every token once: what of it is kept can be told from where."""


def say(url: str, seed: int) -> tuple[list[int], set[int]]:
    """A turn that remembers; its answer, and the tokens that its drafts held."""
    drafted: set[int] = set()
    with (
        pytest.MonkeyPatch.context() as patch,
        Ouroboros(tiny_model("llama", seed), byte_tokenizer(), store=url) as ouro,
    ):
        learn = recycling.Recycling.learn

        def noted(self: recycling.Recycling, round: recycling.Round) -> None:
            drafted.update(round.draft.token_ids[1:])
            learn(self, round)

        patch.setattr(recycling.Recycling, "learn", noted)
        result = ouro.generate(PROMPT, scope="a", options=DecodingOptions(max_new_tokens=40))
    return list(result.token_ids), drafted


def kept(url: str) -> tuple[list[StoredRun], list[StoredNote]]:
    with PhraseStore(url) as store:
        return list(store.export("a")), list(store.export_notes("a"))


@pytest.mark.parametrize("seed", range(3))
def test_answers_are_kept_and_prompts_are_not(tmp_path: Path, seed: int) -> None:
    url = f"sqlite:///{tmp_path}/phrases.db"
    answer, drafted = say(url, seed)
    runs, notes = kept(url)
    assert [list(run.token_ids) for run in runs if run.answer] == [answer]
    assert all(len(run.token_ids) >= 3 for run in runs)
    noted = {int(note.name.rpartition("/")[2]) for note in notes if "/successors/" in note.name}
    end_of_prompt = PROMPT[-1 - PROMPT_POSITIONS :]
    assert noted <= {*answer, *drafted, *end_of_prompt}
    assert noted >= {*end_of_prompt}
    others = {note.name.rpartition("/")[2]: note.data for note in notes if "/successors/" not in note.name}
    assert others.pop("calibration")
    assert others == {run_key(PROMPT).hex(): run_key(answer)}, "of a prompt that is shorter than what counts as its end"


def test_of_prompts_hashes_are_kept() -> None:
    prompt, answer = PROMPT * 2, [5, 6, 7]
    pool = MemoryPool()
    pool.add(answer)
    answers.index_answer(pool, "model", prompt, answer)
    parts = {"whole": prompt, "ending": prompt[-answers._ENDING :]}
    names = {f"answers/model/{kind}/{run_key(part).hex()}" for kind, part in parts.items()}
    assert pool.recall("") == dict.fromkeys(names, run_key(answer))


def test_nothing_of_the_text_is_in_a_calibration(tmp_path: Path) -> None:
    """Two prompts of other tokens, the same kinds of evidence: no key names a token."""
    url = f"sqlite:///{tmp_path}/phrases.db"
    say(url, 0)
    [calibration] = [note.data.decode() for note in kept(url)[1] if note.name.endswith("/calibration")]
    numbers = {int(number) for number in re.findall(r"[\[,](\d+)(?=[,\]])", calibration)}
    assert numbers and max(numbers) < FIRST


def test_the_figures_are_those_of_the_code() -> None:
    defaults = inspect.signature(PhraseStore).parameters
    scopes = inspect.signature(MemorySource).parameters
    for figure in (
        f"last {('eight', 'nine', 'ten')[PROMPT_POSITIONS - 7]} tokens of prompts",
        f"last {answers._ENDING} tokens",
        f"{KEPT_ANSWERS:,} of them",
        f"up to {('seven', 'eight')[recycling.KEPT - 7]} tokens that the model found likeliest",
        f"{('two', 'three', 'four')[phrases._MIN_REJECTED_RUN - 2]} tokens or longer",
        f"{defaults['scope_quota'].default:,} tokens of one tokenizer (`scope_quota`)",
        f"{defaults['quota'].default:,} (`quota`)",
        f"up to {pools._KEPT} of them",
        f"up to {inspect.signature(buffer.Buffer).parameters['capacity'].default >> 20} MiB",
        f"of up to {inspect.signature(SessionStore).parameters['capacity'].default} scopes, up to {KV_BYTES >> 30} GiB",
        f"in pools of {scopes['capacity'].default:,} tokens, of the last {scopes['scopes'].default} scopes",
    ):
        assert figure in PAGE, figure


@pytest.mark.parametrize("command", sorted(set(re.findall(r"ouroboros pool (\w+)", PAGE))))
def test_the_commands_are_there(command: str) -> None:
    assert CliRunner().invoke(pool, [command, "--help"]).exit_code == 0


def test_no_byte_of_a_deleted_scope_is_in_the_files(tmp_path: Path) -> None:
    """Also while another process has the database open, as long as it is not reading."""
    url, scope = f"sqlite:///{tmp_path}/phrases.db", "conversation:a secret name"
    token_ids = list(range(1_000_000, 1_000_200))
    secrets = (scope.encode(), struct.pack("<8I", *token_ids[:8]), b"a secret note")
    with PhraseStore(url) as other:
        other.open(scope, fingerprint="f").add(token_ids)
        other.open(scope, fingerprint="f").remember({"m/calibration": b"a secret note"})
        other.flush()

        def found() -> list[bool]:
            files = [path.read_bytes() for path in tmp_path.iterdir()]
            return [any(secret in data for data in files) for secret in secrets]

        assert found() == [True] * 3
        result = CliRunner().invoke(pool, ["delete", scope, "--yes", "--store", url])
        assert result.exit_code == 0 and result.stderr == ""
        assert found() == [False] * 3


def test_memory_only_keeps_nothing_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUROBOROS_STORE", f"sqlite:///{tmp_path}/phrases.db")
    monkeypatch.setattr(sources, "store_class", None)  # opening any would fail
    with Ouroboros(tiny_model(), byte_tokenizer(), store=None) as ouro:
        ouro.generate(PROMPT, scope="a", options=DecodingOptions(max_new_tokens=8))
    assert list(tmp_path.iterdir()) == []
