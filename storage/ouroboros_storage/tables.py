"""The tables as statements see them. What creates them is `migrations`; a test holds the two together.

Times are microseconds since 1970 (UTC): fine enough that runs added one after the other keep their order.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
)
from sqlalchemy import UniqueConstraint as Unique

metadata = MetaData()

_Id = BigInteger().with_variant(Integer, "sqlite")

scopes = Table(
    "ouroboros_scopes",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", String(255), nullable=False),
    Column("fingerprint", String(255), nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("last_used", BigInteger, nullable=False),
    Column("generation", BigInteger, nullable=False, server_default="0"),
    Column("writes", BigInteger, nullable=False, server_default="0"),
    Column("tokens", BigInteger, nullable=False, server_default="0"),
    Unique("name", "fingerprint"),
)

runs = Table(
    "ouroboros_runs",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("scope_id", _Id, ForeignKey("ouroboros_scopes.id", ondelete="CASCADE"), nullable=False),
    Column("hash", LargeBinary, nullable=False),
    Column("token_ids", LargeBinary, nullable=False),
    Column("length", Integer, nullable=False),
    Column("count", BigInteger, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("last_used", BigInteger, nullable=False),
    Column("answer", SmallInteger, nullable=False, server_default="1"),
    Unique("scope_id", "hash"),
    Index("ouroboros_runs_last_used", "scope_id", "last_used"),
)

notes = Table(
    "ouroboros_notes",
    metadata,
    Column("scope_id", _Id, ForeignKey("ouroboros_scopes.id", ondelete="CASCADE"), primary_key=True),
    Column("name", String(255), primary_key=True),
    Column("data", LargeBinary, nullable=False),
    Column("last_used", BigInteger, nullable=False),
)

migrations = Table("ouroboros_migrations", metadata, Column("version", Integer, primary_key=True, autoincrement=False))
