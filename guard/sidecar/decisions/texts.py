"""Reading of the texts of a request."""

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from guard.classifiers import MAX_TEXT, TextInput, Tokenizer
from guard.errors import RequestError
from guard.protocol.inference_pb2 import ModelInferRequest
from guard.protocol.messages import with_elements
from guard.protocol.tensors import encoded_inputs, find_input, raw_contents, token_ids
from guard.sidecar.decisions.inputs import LARGE_PIXELS, Claims, Inputs
from guard.sidecar.decisions.workers import checkpoint
from guard.sidecar.model_settings import ModelSettings
from guard.sidecar.settings import Settings

MAX_REQUEST_TEXT = 2**18
"""Most bytes of all texts of a request: tokenizers take up to ten microseconds for one."""
_LARGE_TEXT = 2**15
"""Bytes that take about as long to read as `LARGE_PIXELS` do."""


class TextReader:
    """Reads the texts of the requests of one model: as text in UTF-8, or as token ids.

    Args:
        form: What the text tower reads; None if no text is read here, because an upstream server embeds them.
        settings: Settings of the model.
        limits: Settings of the sidecar.

    Attributes:
        tokenizer: Turns texts into token ids; None if no text is read here.

    Raises:
        MissingDependencyError: ftfy or regex is not installed.
        ModelError: The merges are not those of a tokenizer.
    """

    def __init__(self, form: TextInput | None, settings: ModelSettings, limits: Settings) -> None:
        self._settings, self._limits = settings, limits
        self.tokenizer = None if form is None else Tokenizer(form)

    @property
    def _own(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RuntimeError("this sidecar reads no texts of this model")
        return self.tokenizer

    def find_input(self, request: ModelInferRequest) -> int:
        """See `Reader`."""
        settings = self._settings
        return find_input(
            request, settings.input_tensor, others=settings.other_inputs, parameters=settings.pass_parameters
        )

    def claims(self, request: ModelInferRequest) -> Claims:
        """See `Reader`."""
        index = self.find_input(request)
        tensor, raw = request.inputs[index], raw_contents(request, index)
        where = f"input {tensor.name[:128]!r}: "
        if tensor.datatype != "BYTES":
            return Claims(index, where, "text", None, 0, {})
        texts = encoded_inputs(tensor, raw, self._limits.max_batch)
        size = sum(map(len, texts))
        if size > MAX_REQUEST_TEXT:
            raise RequestError(f"{where}its texts have {size} bytes; at most {MAX_REQUEST_TEXT} are read")
        return Claims(index, where, "text", texts, size * (LARGE_PIXELS // _LARGE_TEXT), {})

    def read(
        self,
        request: ModelInferRequest,
        claims: Claims,
        *,
        replaced: bool,
        ambiguous: bool,
        only: Collection[int] | None = None,
    ) -> Inputs:
        """See `Reader`: a text is replaced by that of its tokens, which every server reads as the same tokens."""
        if claims.files is None:
            return self._read_ids(request, claims)
        ids: dict[int, NDArray[np.int64]] = {}
        sent = list(claims.files)
        for row, data in enumerate(claims.files):
            if only is not None and row not in only:
                continue
            checkpoint()
            try:
                ids[row], sent[row] = self._read_text(data, replaced=replaced, ambiguous=ambiguous)
            except RequestError as error:
                claims.troubles[row] = error
        values = np.array([*ids.values()], np.int64).reshape(-1, self._own.form.context)
        canonical = with_elements(request, claims.index, sent) if replaced else None
        return Inputs(values, np.array([*ids], int), len(sent), claims.trouble, canonical)

    def _read_text(self, data: bytes, *, replaced: bool, ambiguous: bool) -> tuple[NDArray[np.int64], bytes]:
        """The ids of a text, and what is forwarded of it.

        Raises:
            RequestError: It cannot be read, or not in one way where it must be.
        """
        if len(data) > 4 * MAX_TEXT:
            raise RequestError(f"it has {len(data)} bytes; at most {4 * MAX_TEXT} are read")
        try:
            text = data.decode()
            ids = self._own.encode(text)
        except UnicodeDecodeError as error:
            raise RequestError("it is not valid UTF-8") from error
        except ValueError as error:
            raise RequestError(str(error)) from error
        if ambiguous and not replaced:
            return self._own.framed(ids), data
        again = self._own.decode(ids)
        if len(ids) > self._own.form.context - 2:
            raise RequestError(f"it has more than {self._own.form.context} tokens, and servers cut it differently")
        if self._own.encode(again) != ids:
            raise RequestError("its tokens stand for no text that is read as the same tokens again")
        if not ambiguous and not self._own.is_plain(text):
            raise RequestError("it has characters that programs clean in different ways")
        return self._own.framed(ids), again.encode() if replaced else data

    def _read_ids(self, request: ModelInferRequest, claims: Claims) -> Inputs:
        form, (start, end) = self._own.form, self._own.ends
        tensor, raw = request.inputs[claims.index], raw_contents(request, claims.index)
        found = token_ids(tensor, raw, form.context, self._limits.max_batch)
        ids = np.zeros((len(found), form.context), np.int64)
        ids[:, : found.shape[1]] = found
        known = ((ids >= 0) & (ids < self._own.size)).all(1)
        whole = known & (ids[:, 0] == start) & (ids == end).any(1)
        if not whole.all():
            row = int(np.flatnonzero(~whole)[0])
            claims.troubles[row] = RequestError(
                f"text {row} of the batch: its token ids are not of one text that begins with {start} and has a {end}"
            )
        return Inputs(ids[whole], np.flatnonzero(whole), len(ids), claims.trouble)
