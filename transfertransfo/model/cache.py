"""Sequences encoded once, over a key-value cache, which then go on a token at a time.

Neighbours that begin alike share a tree while they are encoded (`data.trees`). Each has a row of its own from then on.
"""

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from transfertransfo.data.inputs import tree_sizes
from transfertransfo.data.trees import IGNORED, Fork, pack
from transfertransfo.model.double_heads import DoubleHeads, finite


class RoomyLayer(DynamicLayer):
    """A cache layer with room for the tokens to come: transformers' own copies all keys and values at each token."""

    ROOM = 32  # tokens

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.rooms: dict[str, Tensor] = {}
        self.keys, self.values = self._extended("keys", key_states), self._extended("values", value_states)
        return self.keys, self.values

    def cut_(self, length: int) -> None:
        """Keep the first tokens only."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[..., :length, :], self.values[..., :length, :]

    def unfold_(self, trees: Tensor, columns: Tensor) -> None:
        """Put a row in place for each of R sequences, from its tree, (R, 1), and its tokens' columns there, (R, T)."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = (held[trees, :, columns].transpose(1, 2) for held in (self.keys, self.values))

    def _extended(self, name: str, new: Tensor) -> Tensor:
        kept, room = getattr(self, name), self.rooms.get(name)
        start = kept.size(-2) if kept.numel() else 0
        end = start + new.size(-2)
        if room is None or kept.data_ptr() != room.data_ptr() or end > room.size(-2):  # other rows were chosen, or full
            room = new.new_empty(*new.shape[:-2], end + self.ROOM, new.size(-1))
            if start:
                room[..., :start, :] = kept
            self.rooms[name] = room
        room[..., start:end, :] = new
        return room[..., :end, :]


class CachedRows:
    """Sequences encoded once, which then go on a token at a time, each step at the cost of one position.

    Attributes:
        logits: of each row's next token, (R, vocabulary), float32.
        held: of one sequence and its copies, the tokens, types and positions that the first row's cache begins with.
            The first `certain` of them are the context's. The others are the first row's own, and are dropped when
            another reply takes its place.
    """

    def __init__(self, model: DoubleHeads, sequences: list[dict], new_tokens: int, earlier: "CachedRows | None" = None):
        """Encode sequences of `input_ids`, `token_type_ids` and `position_ids`, for `new_tokens` more at most.

        Neighbours compute what they begin with together. `earlier` rows serve a single sequence as far as it begins
        as their first one does. They are of no use from then on.
        """
        self.model = model
        tokens = [list(zip(row["input_ids"], row["token_type_ids"], row["position_ids"])) for row in sequences]
        lengths = torch.tensor(list(map(len, tokens)), device=model.device)[:, None]  # (R, 1)
        self.columns = self.certain = int(lengths.max())
        self.held = tokens[0] if len(tokens) == 1 else []
        # rows are aligned on the right, so that all of them go on in the same column
        column = torch.arange(self.columns + new_tokens, device=model.device)
        self.attended = column >= self.columns - lengths  # (R, all columns)
        self.ragged = bool((lengths < self.columns).any())
        self.cache = Cache(layer_class_to_replicate=RoomyLayer)
        hidden = self._encode_one(earlier) if self.held else self._encode_trees(tokens)
        self.logits = finite(model.lm_logits(hidden).float())
        last = torch.tensor([row[-1] for row in tokens], device=model.device)
        self.types, self.positions = last[:, 1:2], last[:, 2:] + 1  # of the next token

    def _encode_one(self, earlier: "CachedRows | None") -> Tensor:
        """The last hidden state, (1, C), of the sequence that is held."""
        served = earlier.serve_(self.held) if earlier else 0
        if earlier and served:
            self.cache = earlier.cache
        ids, types, positions = torch.tensor(self.held[served:], device=self.model.device).T[:, None]  # (1, T) each
        mask = None
        if served:
            column = torch.arange(self.columns, device=self.model.device)
            mask = (column <= column[served:, None])[None, None]
        return self.model.hidden_states(ids, types, positions, mask, self.cache)[:, -1]

    def _encode_trees(self, tokens: list[list[tuple[int, int, int]]]) -> Tensor:
        """The last hidden states, (R, C), of sequences of tokens, types and positions."""
        # 1) encode
        columns_of = (map(list, zip(*row)) for row in tokens)
        forks = [Fork(ids, types, positions, [[]], IGNORED) for ids, types, positions in columns_of]
        sizes = tree_sizes(list(map(len, tokens)), map(_shared_length, tokens, tokens[1:]))
        batch = pack(forks, 0, sizes=sizes).to(self.model.device)
        mask = batch.attention_mask()
        hidden = self.model.hidden_states(
            batch.input_ids, batch.token_type_ids, batch.position_ids, mask, self.cache
        ).flatten(0, 1)
        # 2) a row for each sequence: its last token attends to all of its tokens, and to these alone
        last = batch.last_positions.flatten()
        trees = torch.repeat_interleave(torch.tensor(sizes, device=last.device))
        path = mask[trees, 0, last - trees * mask.size(-1)]  # (R, a tree's columns)
        columns = torch.zeros_like(self.attended[:, : self.columns], dtype=torch.long)
        columns[self.attended[:, : self.columns]] = path.nonzero()[:, 1]
        for layer in self.cache.layers:
            assert isinstance(layer, RoomyLayer)
            layer.unfold_(trees[:, None], columns)
        return hidden[last]

    def serve_(self, wanted: list[tuple[int, int, int]]) -> int:
        """Cut the cache down to what a sequence begins with; returns the number of tokens, less than its length."""
        length = _shared_length(self.held, wanted[:-1])  # the last one's hidden state is needed
        if length:
            if len(self.logits) > 1:
                self.cache.batch_select_indices(torch.zeros(1, dtype=torch.long, device=self.logits.device))
            for layer in self.cache.layers:
                assert isinstance(layer, RoomyLayer)
                layer.cut_(length)
        return length

    def repeat_(self, times: int) -> None:
        """Put `times` copies of each row in its place, one after the other."""
        if times > 1:
            self.cache.batch_repeat_interleave(times)
            for name in ("logits", "types", "positions", "attended"):
                setattr(self, name, getattr(self, name).repeat_interleave(times, 0))

    def select_(self, rows: Tensor) -> None:
        """Keep the rows of these indices; one may be taken several times."""
        if self.held and rows[0] != 0:  # of the same context, and another reply
            del self.held[self.certain :]
        self.cache.batch_select_indices(rows)
        for name in ("logits", "types", "positions", "attended"):
            setattr(self, name, getattr(self, name)[rows])

    def append_(self, tokens: Tensor) -> None:
        """Go on by one token a row: (R,)."""
        token = int(tokens[0]), int(self.types[0]), int(self.positions[0])
        self.columns += 1
        keys = self.attended[:, None, None, : self.columns] if self.ragged else None
        hidden = self.model.hidden_states(tokens[:, None], self.types, self.positions, keys, self.cache)[:, -1]
        self.logits = finite(self.model.lm_logits(hidden).float())
        self.positions = self.positions + 1
        if len(self.held) == self.columns - 1:  # not before: a forward may be interrupted
            self.held.append(token)


def _shared_length(one: list, other: list) -> int:
    """How many elements two lists begin with alike."""
    return next((i for i, (here, there) in enumerate(zip(one, other)) if here != there), min(len(one), len(other)))


class PrefixCache:
    """The rows that the last reply of a chat was made with: the next context mostly begins with the same tokens."""

    def __init__(self) -> None:
        self.rows: CachedRows | None = None

    def encode(self, model: DoubleHeads, sequences: list[dict], new_tokens: int) -> CachedRows:
        """Rows of sequences, of which only what the last ones do not serve is computed."""
        earlier, self.rows = self.rows, None  # which an interruption would leave in pieces
        self.rows = CachedRows(model, sequences, new_tokens, earlier)
        return self.rows
