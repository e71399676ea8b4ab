"""The fields of config.json that matter to every architecture here, checked as they are read."""

from __future__ import annotations

from dataclasses import Field, dataclass, fields
from reprlib import repr as short
from typing import Any, TypeVar

import mlx.core as mx

from mlx_flashmoe.errors import FormatError
from mlx_flashmoe.models.cache import KVCache
from mlx_flashmoe.models.rope import Rope

C = TypeVar("C", bound="BaseConfig")

# The largest whole numbers that config.json may have: no published model comes near.
MOST = {"num_hidden_layers": 4096, "num_experts": 1 << 16}
MOST_ELSE = 1 << 30

# Tokens of a prompt that mix at once: what a layer holds for them is several times wider than all else, and where
# memory is shared with much else a chunk is to be long all the same, because its experts are read once.
MIXED = {mx.DeviceType.cpu: 64, mx.DeviceType.gpu: 256}


def mixed_at_once() -> int:
    """Tokens that mix at once on the current device."""
    return MIXED[mx.default_device().type]


@dataclass(frozen=True)
class BaseConfig:
    """Fields have their names in config.json. None has a default that a checkpoint sets.

    Attributes:
        dense_layers: layers without experts.
        intermediate_size: hidden dims of a layer without experts; None if there is no such layer.
        context_length: tokens of prompt and answer the model is made for, at most; None if config.json does not say.
    """

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    rms_norm_eps: float
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: Rope
    context_length: int | None
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    dense_layers: tuple[int, ...]
    intermediate_size: int | None
    attention_bias: bool
    tie_word_embeddings: bool
    dtype: str

    @classmethod
    def from_dict(cls: type[C], config: dict[str, Any]) -> C:
        """From a whole config.json, whose text_config, if it has one, describes the language model.

        Raises:
            FormatError: a field is missing, malformed, or has a value that is not supported.
        """
        inner = config.get("text_config", {})
        if not isinstance(inner, dict):
            raise FormatError("config.json: text_config is not an object")
        where = "config.json (text_config)" if inner else "config.json"
        text = {**config, **inner}
        # The model's own flag is the outer one; transformers goes by it, and so do published files.
        text["tie_word_embeddings"] = config.get(
            "tie_word_embeddings", inner.get("tie_word_embeddings", False)
        )
        text.setdefault("attention_bias", False)
        try:
            for field in fields(cls):
                if field.name in text:
                    _check(field, text[field.name])
            given = {**text, **cls.derive(text)}
            values = {}
            for field in fields(cls):
                if given.get(field.name) is None and "None" not in str(field.type):
                    raise FormatError(f"{field.name} is missing")
                values[field.name] = given[field.name]
                _check(field, values[field.name])
        except FormatError as e:
            raise FormatError(f"{where}: {e}") from None
        except KeyError as e:
            raise FormatError(f"{where}: {e.args[0]} is missing") from None
        except (TypeError, ValueError, ArithmeticError) as e:
            raise FormatError(f"{where}: {e!r}: a value is malformed") from None
        if values["num_experts_per_tok"] > values["num_experts"]:
            raise FormatError(
                f"{where}: num_experts_per_tok is more than the {values['num_experts']} of num_experts"
            )
        return cls(**values)

    @classmethod
    def derive(cls, text: dict[str, Any]) -> dict[str, Any]:
        """Returns the fields that are not simply looked up; architectures add theirs.

        Args:
            text: whole numbers and flags in it are checked already.

        Raises:
            FormatError: a value is not supported. Its message names the value; the file is added to it.
        """
        if text.get("hidden_act", "silu") != "silu":
            raise FormatError(f"hidden_act {text['hidden_act']!r} is not supported, only silu")
        dense = cls.find_dense_layers(text)
        if len(dense) == text["num_hidden_layers"]:
            raise FormatError("no layer has experts")
        if dense and text.get("intermediate_size") is None:
            raise FormatError("intermediate_size is missing")
        rope = Rope.from_config(text)
        return {
            "rope": rope,
            "dense_layers": dense,
            "intermediate_size": text["intermediate_size"] if dense else None,
            "context_length": rope.context_length(text),
            "dtype": str(text.get("dtype") or text.get("torch_dtype") or "bfloat16"),
        }

    @classmethod
    def find_dense_layers(cls, text: dict[str, Any]) -> tuple[int, ...]:
        """Returns the layers without experts; architectures that may have some say which.

        Raises:
            FormatError: as of ``derive``.
        """
        return ()

    @property
    def selectable_experts(self) -> int:
        """Experts of a layer that one token can use, at most."""
        return self.num_experts

    @property
    def moe_layers(self) -> list[int]:
        """The layers with experts, ascending."""
        return [i for i in range(self.num_hidden_layers) if i not in self.dense_layers]

    def kv_bytes(self, tokens: int, dtype: mx.Dtype) -> int:
        """Bytes of the cache of one sequence of ``tokens`` tokens."""
        return self.num_hidden_layers * self._layer_kv_bytes(tokens, dtype)

    def _layer_kv_bytes(self, tokens: int, dtype: mx.Dtype) -> int:
        held = -(-tokens // KVCache.step) * KVCache.step
        return 2 * self.num_key_value_heads * self.head_dim * dtype.size * held

    def activation_bytes(self, dtype: mx.Dtype) -> int:
        """Bytes a prompt's token takes while a chunk goes through a layer, but for its mixing."""
        # The residual before and after, its norm, a row of an expert; in float32 that row's result, weighted too, and
        # the sum of a token's experts, old and new; the router's scores.
        routed = self.hidden_size * (4 * dtype.size + 4 * 4) + 3 * 4 * self.num_experts
        # Without experts: the residual before and after, its norm, gate, up and their product.
        dense = (3 * self.hidden_size + 3 * (self.intermediate_size or 0)) * dtype.size
        return max(routed, dense)

    def mixing_bytes(self, dtype: mx.Dtype) -> int:
        """Bytes a token takes while it mixes with others, at the widest place of all."""
        # Queries, keys and values as projected, normalized and rotated, and attention's output.
        width = (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        return (3 * width + self.num_attention_heads * self.head_dim) * dtype.size


def head_dim(text: dict[str, Any]) -> int:
    """Dims of a head: those that config.json gives, or the hidden size's share."""
    given: int | None = text.get("head_dim")
    return text["hidden_size"] // text["num_attention_heads"] if given is None else given


def layers_between_sparse(text: dict[str, Any]) -> tuple[int, ...]:
    """The layers without experts, as transformers reads mlp_only_layers and decoder_sparse_step."""
    only, step = text.get("mlp_only_layers") or [], text.get("decoder_sparse_step", 1)
    if not isinstance(only, list) or not all(type(i) is int for i in only):
        raise FormatError(f"mlp_only_layers must be a list of layers, not {short(only)}")
    if type(step) is not int or step < 1:
        raise FormatError(f"decoder_sparse_step must be a whole number from 1, not {short(step)}")
    return tuple(i for i in range(text["num_hidden_layers"]) if i in set(only) or (i + 1) % step)


def first_layers(text: dict[str, Any]) -> tuple[int, ...]:
    """The layers without experts: the first of first_k_dense_replace."""
    return tuple(range(whole(text, "first_k_dense_replace", 0, text["num_hidden_layers"] - 1)))


def whole(text: dict[str, Any], name: str, least: int = 1, most: int = MOST_ELSE) -> int:
    """Returns a whole number of config.json that no field has the name of.

    Raises:
        FormatError: it is not one, or not in these bounds.
        KeyError: it is missing.
    """
    value = text[name]
    if type(value) is not int or not least <= value <= most:
        raise FormatError(f"{name} must be a whole number from {least} to {most}, not {short(value)}")
    return value


def _check(field: Field[Any], value: Any) -> None:
    """Raises FormatError unless a value is of its field's type, where that is a number or a flag."""
    if field.type == "int" or (field.type == "int | None" and value is not None):
        whole({field.name: value}, field.name, most=MOST.get(field.name, MOST_ELSE))
    elif field.type == "float" and (type(value) not in (int, float) or not 0 < value < float("inf")):
        raise FormatError(f"{field.name} must be a number above 0, not {short(value)}")
    elif field.type == "bool" and not isinstance(value, bool):
        raise FormatError(f"{field.name} must be true or false, not {short(value)}")
