"""What the clients in Python ask for."""

from enum import Enum

from pydantic import BaseModel


class Kind(Enum):
    refund = "refund"
    delivery = "delivery"


class Item(BaseModel):
    kind: Kind
