"""An agent that answers questions about a SQLite database, and what its phrases bought.

Run it with `python examples/langgraph_sql_agent.py`; with `--model smollm2-135m-instruct` it takes seconds, and its
answers are poor. Every question is a conversation of its own. The agent asks for the tables, then for the columns of
those it needs, then queries and answers as it likes. With `--runs 2` the same agent gets the same questions again, in
a new process and in new conversations; `--compare` asks them a last time with plain decoding, a token a pass.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any
from uuid import uuid4

from langchain.agents import create_agent
from langchain.agents.middleware import ModelCallLimitMiddleware, ModelRequest, wrap_model_call
from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from langchain_core.tools import BaseTool, tool

from _shop import QUESTIONS, shop
from _table import (
    about,
    arguments,
    as_dicts,
    conditions,
    in_another_process,
    main_or_part,
    percent,
    plain,
    replies,
    show,
)
from langchain_ouroboros import ChatOuroboros

PROMPT = """You answer questions about the SQLite database of a shop, by calling one tool at a time.
List the tables, describe those that the question is about, run a query, then answer with the values from its rows.
If a query fails, correct it and run it again."""
IN_ORDER = ("list_tables", "describe_tables")
ROWS, CALLS = 12, 8
"""Rows that a query shows, and replies to one question, at most."""


def tools_for(database: sqlite3.Connection) -> list[BaseTool]:
    """What the agent can do with a database."""

    def rows(sql: str) -> str:
        cursor = database.execute(sql)
        found = cursor.fetchmany(ROWS + 1)
        names = [column[0] for column in cursor.description or ()]
        lines = [" | ".join(map(str, row)) for row in [names, *found[:ROWS]]]
        return "\n".join(lines + ["..."] * (len(found) > ROWS)) if found else "no rows"

    @tool
    def list_tables() -> str:
        """List the tables."""
        return ", ".join(name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'"))

    @tool
    def describe_tables(tables: list[str]) -> str:
        """Show the columns of tables."""
        marks = ", ".join("?" * len(tables))
        found = database.execute(f"SELECT sql FROM sqlite_master WHERE name IN ({marks})", tables)
        return "\n".join(sql for (sql,) in found) or "no such tables"

    @tool
    def run_query(sql: str) -> str:
        """Run a query and show its rows."""
        try:
            return rows(sql)
        except sqlite3.Error as error:
            return f"error: {error}"

    @tool(return_direct=True)
    def answer(text: str) -> str:
        """Answer the question in a sentence."""
        return text

    return [list_tables, describe_tables, run_query, answer]


@wrap_model_call
def step_by_step(request: ModelRequest, handler: Callable[[ModelRequest], Any]) -> Any:
    """Every reply is a call: first those that are always needed, then whichever the model chooses."""
    called = {message.name for message in request.messages if isinstance(message, ToolMessage)}
    return handler(request.override(tool_choice=next((name for name in IN_ORDER if name not in called), "any")))


def work(given: Namespace) -> dict[str, Any]:
    """Ask all questions once, each in a new conversation."""
    model = ChatOuroboros(
        model=given.model,
        draft_model=given.draft_model,
        dtype=given.dtype,
        store=given.store,
        learn_agent=given.learn,
        max_tokens=given.max_tokens,
        max_draft_tokens=given.max_draft_tokens,
        drafters=given.drafters.split(",") if given.drafters else None,
    )
    model = plain(model) if given.plain else model
    watched: list[Any] = [ModelCallLimitMiddleware(run_limit=CALLS), *([] if given.free else [step_by_step])]
    tools = tools_for(shop())
    agent: Any = create_agent(model, tools, system_prompt=PROMPT, name=given.agent, middleware=watched)
    tasks: list[dict[str, Any]] = []
    for question in QUESTIONS[: given.tasks]:
        began = perf_counter()
        state = agent.invoke({"messages": [("user", question)]}, {"configurable": {"thread_id": uuid4().hex}})
        said = state["messages"][1:]
        print(f"{len(tasks) + 1:2} {question}\n   {_last(said)}", flush=True)
        tasks.append(
            {
                "question": question,
                "messages": [_form(message) for message in said],
                "replies": as_dicts(replies(said)),
                "wall_seconds": perf_counter() - began,
            }
        )
    return {"conditions": about(model), "tasks": tasks}


def _form(message: BaseMessage) -> list[Any]:
    """All that a message says."""
    if not isinstance(message, AIMessage):
        return [message.type, message.content]
    calls = [[call["name"], call["args"]] for call in (*message.tool_calls, *message.invalid_tool_calls)]
    return [message.type, message.content, calls]


def _last(messages: Sequence[BaseMessage]) -> str:
    return " ".join(str(messages[-1].content).split())


def _counts(task: dict[str, Any]) -> dict[str, float]:
    replies = task["replies"]
    names = ("completion_tokens", "target_forwards", "draft_forwards", "prompt_tokens", "cached_tokens", "seconds")
    counts = {name: sum(reply[name] for reply in replies) for name in names}
    final = replies[-1]["prompt_tokens"] if replies else 0
    prefilled = counts["prompt_tokens"] - counts["cached_tokens"]
    return {**counts, "calls": len(replies), "prefilled_tokens": prefilled, "final_prompt_tokens": final}


def _sum(tasks: Iterable[dict[str, Any]]) -> dict[str, float]:
    counts = [{**_counts(task), "wall_seconds": task["wall_seconds"]} for task in tasks]
    return {name: sum(one[name] for one in counts) for name in counts[0]}


def report(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures of all runs, those of plain decoding measured or, where it did not run, a pass per token."""
    reference = found.get("plain")
    figures = {}
    for name, run in found.items():
        counts = _sum(run["tasks"])
        alone = _sum(reference["tasks"]) if reference else None
        figures[name] = {
            **counts,
            "plain_forwards": alone["target_forwards"] if alone else counts["completion_tokens"],
            "prefilled_of_final_prompts": counts["prefilled_tokens"] / counts["final_prompt_tokens"],
            "wall_ratio": alone["wall_seconds"] / counts["wall_seconds"] if alone else None,
            "same_messages": sum(
                mine["messages"] == its["messages"] for mine, its in zip(run["tasks"], reference["tasks"], strict=True)
            )
            if reference
            else None,
        }
    return figures


def show_run(name: str, run: dict[str, Any], reference: dict[str, Any] | None) -> None:
    """A table with a line per question."""
    columns = ("question", "replies", "tokens", "forwards", "of plain's", "prefilled", "final prompt")
    rows = []
    plain_tasks = reference["tasks"] if reference else run["tasks"]
    for number, (task, alone) in enumerate(zip(run["tasks"], plain_tasks, strict=True), 1):
        counts = _counts(task)
        forwards = _counts(alone)["target_forwards" if reference else "completion_tokens"]
        rows.append(_row(str(number), counts, forwards))
    counts = _sum(run["tasks"])
    forwards = _sum(plain_tasks)["target_forwards" if reference else "completion_tokens"]
    show(name, columns, [*rows, _row("all", counts, forwards)], ends="all")


def _row(name: str, counts: dict[str, float], plain_forwards: float) -> tuple[object, ...]:
    shown = ("prefilled_tokens", "final_prompt_tokens")
    of_plain = percent(counts["target_forwards"], plain_forwards)
    first = (counts["calls"], counts["completion_tokens"], counts["target_forwards"], of_plain)
    return (name, *map(int, first[:3]), of_plain, *(int(counts[key]) for key in shown))


def main(given: Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        part, store = Path(folder) / "part.json", given.store or f"sqlite:///{Path(folder) / 'phrases.db'}"
        found = {}
        for number in range(1, given.runs + 1):
            name = f"run {number}"
            found[name] = in_another_process(__file__, given, name, part, store=store)
        if given.compare:
            found["plain"] = in_another_process(__file__, given, "plain decoding", part, store=store, plain=True)
    reference = found.get("plain")
    for name, run in found.items():
        if run is not reference:
            show_run(name, run, reference)
    figures = report(found)
    columns = ("", "tokens", "forwards", "of plain's", "prefilled / final prompts", "times plain", "same messages")
    show(f"{given.tasks} questions", columns, [_total(name, figures[name], given.tasks) for name in figures])
    print(conditions(next(iter(found.values()))["conditions"]))
    if given.json:
        Path(given.json).write_text(json.dumps({"figures": figures, "runs": found}, indent=1) + "\n")
    if any(one["same_messages"] not in (None, given.tasks) for one in figures.values()):
        raise SystemExit("messages differ from those of plain decoding")


def _total(name: str, one: dict[str, Any], tasks: int) -> tuple[object, ...]:
    return (
        name,
        int(one["completion_tokens"]),
        int(one["target_forwards"]),
        percent(one["target_forwards"], one["plain_forwards"]),
        f"{one['prefilled_of_final_prompts']:.2f}",
        f"{one['wall_ratio']:.2f}" if one["wall_ratio"] else "-",
        f"{one['same_messages']}/{tasks}" if one["same_messages"] is not None else "-",
    )


def flags() -> ArgumentParser:
    parser = arguments(__doc__)
    parser.set_defaults(model="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--draft-model", help="a smaller model of the same vocabulary that drafts too")
    parser.add_argument("--tasks", type=int, default=len(QUESTIONS), help="questions, from the first [%(default)s]")
    parser.add_argument("--runs", type=int, default=2, help="how often, each in a process of its own [%(default)s]")
    parser.add_argument("--agent", default="shop", metavar="NAME", help="whose phrases [%(default)s]")
    parser.add_argument("--learn", action=BooleanOptionalAction, default=True, help="add what is said to the agent's")
    parser.add_argument("--free", action="store_true", help="let the model choose whether and what to call")
    parser.add_argument("--compare", action="store_true", help="also decode plainly, and compare all messages")
    parser.add_argument("--plain", action="store_true", help="decode plainly instead")
    parser.add_argument(
        "--max-draft-tokens", type=int, metavar="N", help="guesses per pass [as many as pay by the clock]"
    )
    parser.add_argument("--drafters", metavar="NAME,...", help="where guesses may come from [all but lookahead]")
    parser.add_argument("--max-tokens", type=int, default=200, help="per reply, at most [%(default)s]")
    parser.add_argument("--json", metavar="FILE", help="where figures and messages go")
    return parser


if __name__ == "__main__":
    main_or_part(flags(), main, work)
