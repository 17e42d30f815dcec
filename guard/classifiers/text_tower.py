"""The text tower of a classifier, opened between token embeddings and features."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from guard.classifiers.classifier import Classifier
from guard.errors import ModelError

_POOLS = ("argmax", "eos", "last", "first")


class TextTower:
    """The text tower of open_clip's `CLIP` and `CustomTextCLIP`, of any width and depth, with causal or full attention.

    `Classifier.encode_texts` goes from texts to embeddings in one step. Here the way has three parts, so that something
    that is no text can be put among the tokens, and so that the features of all tokens can be read:
    `embed` (token ids to hidden states), `features` (through the transformer), `pooled` (the embedding of the text).

    Args:
        classifier: Its text tower is used, frozen as it is there.

    Attributes:
        device: The device that it runs on.

    Raises:
        ModelError: The tower is not one of open_clip's own transformers, or has a class token (CoCa) or a mask of
            padding, by which the attention would depend on the text.
    """

    def __init__(self, classifier: Classifier) -> None:
        model: Any = classifier.model
        tower: Any = model if hasattr(model, "token_embedding") else getattr(model, "text", None)
        if not all(hasattr(tower, name) for name in ("token_embedding", "positional_embedding", "transformer")):
            raise ModelError(f"the text tower of {classifier.source} is not one of open_clip's own transformers")
        pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", ""))
        if getattr(tower, "cls_emb", None) is not None or getattr(tower, "use_pad_mask", False) or pool not in _POOLS:
            raise ModelError(
                f"the text tower of {classifier.source} has a class token, a mask of padding or pooling by {pool!r}; "
                "guard examines text towers without them"
            )
        self.classifier = classifier
        self.device = classifier.device
        self._tower = tower
        self._pool = pool
        self._end: int = getattr(tower, "text_eos_id", getattr(tower, "eos_id", 0))

    @property
    def context(self) -> int:
        """Largest number of tokens, start and end included."""
        return int(self._tower.positional_embedding.shape[0])

    @property
    def width(self) -> int:
        """Length of a hidden state."""
        return int(self._tower.positional_embedding.shape[1])

    @property
    def causal(self) -> bool:
        """Whether a token sees only those before it."""
        return self._tower.attn_mask is not None

    @property
    def read_at_end(self) -> bool:
        """Whether the embedding of a text is read at its end token, wherever that is."""
        return self._pool in {"argmax", "eos"}

    @property
    def trimmed(self) -> bool:
        """Whether what follows the largest id of a text changes nothing."""
        return self.causal and self._pool == "argmax"

    @property
    def table(self) -> Tensor:
        """The embedding of each token of the vocabulary: shape [V, width]."""
        table: Tensor = self._tower.token_embedding.weight
        return table

    @property
    def blocks(self) -> Sequence[torch.nn.Module]:
        """The layers of the transformer, the first one first."""
        return list(self._tower.transformer.resblocks)

    def modules(self) -> list[torch.nn.Module | torch.nn.Parameter]:
        """The parts that belong to the text tower, for whoever trains it."""
        names = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")
        return [part for name in names if (part := getattr(self._tower, name, None)) is not None]

    def parameters(self) -> list[torch.nn.Parameter]:
        """All weights of the text tower, in a fixed order."""
        found: list[torch.nn.Parameter] = []
        for part in self.modules():
            found += [part] if isinstance(part, torch.nn.Parameter) else list(part.parameters())
        return found

    @contextmanager
    def sparse_table(self) -> Iterator[None]:
        """Give the token table sparse gradients for as long as this lasts."""
        embedding = self._tower.token_embedding
        before, embedding.sparse = embedding.sparse, True
        try:
            yield
        finally:
            embedding.sparse = before

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Token ids, padded or cut to the context: int64, shape [N, context]."""
        return self.classifier.tokenizer(list(texts)).to(self.device)

    def ends(self, tokens: Tensor) -> Tensor:
        """The place of the token whose feature is the embedding of the text: int64, shape [N]."""
        if self._pool == "argmax":
            return tokens.argmax(-1)
        if self._pool == "eos":
            return torch.eq(tokens, self._end).int().argmax(-1)
        place = tokens.shape[1] - 1 if self._pool == "last" else 0
        return torch.full((len(tokens),), place, device=tokens.device)

    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states before the transformer: shape [N, L, width], for ids of shape [N, L], L at most the context."""
        hidden: Tensor = self._tower.token_embedding(tokens) + self.positions(tokens.shape[1])
        return hidden

    def positions(self, length: int) -> Tensor:
        """The positional embeddings of the first tokens: shape [length, width]."""
        positions: Tensor = self._tower.positional_embedding[:length]
        return positions

    def features(self, hidden: Tensor) -> Tensor:
        """The features of all tokens, after the last layer norm: the shape of `hidden`, [N, L, width].

        A causal tower gives the same features to the first tokens however long the rest is.
        """
        mask = self._tower.attn_mask
        length = hidden.shape[1]
        with self.classifier.autocast():
            states = self._tower.transformer(hidden, attn_mask=None if mask is None else mask[:length, :length])
            found: Tensor = self._tower.ln_final(states)
        return found.float()

    def pooled(self, features: Tensor, ends: Tensor) -> Tensor:
        """The L2-normalised embeddings of texts, shape [N, D], from the features of their tokens.

        Args:
            features: Shape [N, L, width].
            ends: Where each text is read: shape [N].
        """
        rows = features.gather(1, ends[:, None, None].expand(-1, 1, features.shape[-1]))[:, 0]
        projection = self._tower.text_projection
        if projection is not None:
            rows = projection(rows) if isinstance(projection, torch.nn.Linear) else rows @ projection
        return normalize(rows.float(), dim=-1)

    def encode(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """Embeddings of many texts, L2-normalised, on the tower's device: shape [N, D].

        Raises:
            ModelError: An embedding is not finite.
        """
        return self.encode_tokens(self.tokens(texts), batch)

    @torch.no_grad()
    def encode_tokens(self, tokens: Tensor, batch: int = 256) -> Tensor:
        """The same for token ids of shape [N, context]; texts of like length share a batch, which saves padding.

        Raises:
            ModelError: An embedding is not finite.
        """
        order = self.ends(tokens).argsort(stable=True)
        parts = []
        for rows in order.split(batch):
            some = tokens[rows]
            if self.causal:
                some = some[:, : int(self.ends(some).max()) + 1]
            parts.append(self.pooled(self.features(self.embed(some)), self.ends(some)))
        found = torch.cat(parts)[order.argsort()]
        if not found.isfinite().all():
            raise ModelError(f"{self.classifier.source} computes no finite numbers: its embeddings of texts overflow")
        return found
