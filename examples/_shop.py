"""A small shop's database, the same whenever it is made, and questions to it."""

from __future__ import annotations

import sqlite3
from datetime import date, timedelta
from random import Random

SCHEMA = """
CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT, city TEXT, country TEXT, signup_year INTEGER);
CREATE TABLE products (id INTEGER PRIMARY KEY, name TEXT, category TEXT, price REAL, stock INTEGER);
CREATE TABLE orders (id INTEGER PRIMARY KEY, customer_id INTEGER, ordered_on DATE, status TEXT,
  FOREIGN KEY (customer_id) REFERENCES customers (id));
CREATE TABLE order_items (order_id INTEGER, product_id INTEGER, quantity INTEGER,
  FOREIGN KEY (order_id) REFERENCES orders (id), FOREIGN KEY (product_id) REFERENCES products (id));
CREATE TABLE refunds (id INTEGER PRIMARY KEY, order_id INTEGER, amount REAL, reason TEXT,
  FOREIGN KEY (order_id) REFERENCES orders (id));
"""

QUESTIONS = (
    "How many customers are from Germany?",
    "What are the names and prices of the three most expensive products?",
    "How many products are there in each category?",
    "How many orders were cancelled?",
    "Which customers live in Norway, and in which cities?",
    "What is the total amount of all refunds?",
    "Which five customers have placed the most orders, and how many has each?",
    "Which products are out of stock?",
    "What is the average price of the products in each category?",
    "How many customers signed up in each year?",
    "Which reasons for refunds are there, and how often was each given?",
    "How many orders were placed in 2024?",
    "Which product has been sold in the largest total quantity?",
    "How many orders have each status?",
    "What did the order with id 42 contain, by product name and quantity?",
    "Which customers have never placed an order?",
    "How many customers are there in each country, most first?",
    "What is the largest refund, and what was its reason?",
    "On which date was the latest order placed, and by which customer?",
    "Which products cost less than 10 euros, cheapest first?",
)

_CITIES = {
    "Germany": ("Berlin", "Hamburg", "Leipzig"),
    "Norway": ("Oslo", "Bergen"),
    "France": ("Lyon", "Nantes", "Paris"),
    "Italy": ("Turin", "Bologna"),
    "Poland": ("Gdansk", "Krakow"),
}
_FIRST = ("Ada", "Bruno", "Clara", "David", "Elif", "Felix", "Greta", "Hugo", "Ines", "Jonas", "Karin", "Luca")
_LAST = ("Berg", "Conti", "Dupont", "Fischer", "Hansen", "Kowalski", "Larsen", "Moreau", "Novak", "Ricci")
_PRODUCTS = {
    "garden": ("rake", "spade", "watering can", "hedge shears", "seed box", "wheelbarrow"),
    "kitchen": ("saucepan", "chef's knife", "grater", "teapot", "mixing bowl", "pepper mill"),
    "office": ("desk lamp", "stapler", "notebook", "fountain pen", "paper tray"),
    "outdoor": ("tent", "sleeping bag", "camp stove", "headlamp", "water bottle", "compass"),
    "toys": ("kite", "wooden train", "puzzle", "yo-yo", "chess set"),
}
_STATUSES = ("delivered", "delivered", "delivered", "shipped", "open", "cancelled")
_FIRST_DAY = date(2023, 1, 2)
_ORDERS = 150
_REASONS = ("damaged", "late delivery", "wrong item", "no longer needed")


Row = tuple[str | int | float, ...]


def shop() -> sqlite3.Connection:
    """The database, in memory; any thread may read it."""
    connection = sqlite3.connect(":memory:", check_same_thread=False)
    connection.executescript(SCHEMA)
    for table, rows in _tables(Random(7)).items():
        connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)
    connection.commit()
    return connection


def _tables(chance: Random) -> dict[str, list[Row]]:
    products = [(name, category) for category, names in _PRODUCTS.items() for name in names]
    ids = range(1, len(products) + 1)
    return {
        "customers": _customers(chance, 60),
        "products": [
            (id, name, category, round(chance.uniform(4, 180), 2), chance.choice((0, 3, 8, 15, 40)))
            for id, (name, category) in zip(ids, products, strict=True)
        ],
        "orders": [
            # The last customers have not bought anything yet.
            (id, chance.randint(1, 54), str(_FIRST_DAY + timedelta(chance.randrange(700))), chance.choice(_STATUSES))
            for id in range(1, _ORDERS + 1)
        ],
        "order_items": [
            (order, product, chance.randint(1, 4))
            for order in range(1, _ORDERS + 1)
            for product in chance.sample(ids, chance.randint(1, 3))
        ],
        "refunds": [
            (id, order, round(chance.uniform(5, 120), 2), chance.choice(_REASONS))
            for id, order in enumerate(sorted(chance.sample(range(1, _ORDERS + 1), 24)), 1)
        ],
    }


def _customers(chance: Random, number: int) -> list[Row]:
    names = chance.sample([f"{first} {last}" for first in _FIRST for last in _LAST], number)
    rows: list[Row] = []
    for id, name in enumerate(names, 1):
        country = chance.choice(list(_CITIES))
        rows.append((id, name, chance.choice(_CITIES[country]), country, chance.randint(2019, 2024)))
    return rows
