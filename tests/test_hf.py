"""The transformers wrapper: its numbers are the model's, its files round-trip, generate() works."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small_model import VOCAB, random_tokens, small_config, small_model
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
safetensors_torch = pytest.importorskip("safetensors.torch")

from megalodon_ops import (  # noqa: E402
    Megalodon,
    MegalodonState,
    hf,
    load_checkpoint,
    save_checkpoint,
)
from megalodon_ops.hf import (  # noqa: E402
    MegalodonCache,
    MegalodonForCausalLM,
    MegalodonHfConfig,
    byte_tokenizer,
    modeling,
)

F32 = torch.float32


def wrapped(**changes: Any) -> tuple[Megalodon, MegalodonForCausalLM]:
    model = small_model(dtype=F32, **changes).eval()
    return model, MegalodonForCausalLM.wrap(model)


def greedy(model: Megalodon, prompt: Tensor, count: int) -> Tensor:
    """Our own decoding of a batch: the most likely token, one at a time."""
    tokens, state = prompt, None
    with torch.no_grad():
        for _ in range(count):
            new = tokens if state is None else tokens[:, -1:]
            logits, state = model(new, state, return_state=True)
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return tokens


# Configuration and files


def test_configuration() -> None:
    core = small_config(swiglu=True, rope_base=50.0, share_emb=True, output_size=None)
    config = MegalodonHfConfig.from_core(core, eos_token_id=3)
    assert config.core() == core
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (12, 2, 2)
    assert config.tie_word_embeddings
    again = MegalodonHfConfig.from_dict(json.loads(config.to_json_string()))
    assert again.core() == core
    assert MegalodonHfConfig(hidden_size=64, norm_num_groups=8).model_dim == 64
    assert MegalodonHfConfig().core().model_dim == 1024
    with pytest.raises(ValueError, match="z_dim: wanted a multiple of num_heads = 3"):
        MegalodonHfConfig(num_heads=3)
    with pytest.raises(ValueError, match="tie_word_embeddings: wanted share_emb = True; got False"):
        MegalodonHfConfig(share_emb=True, tie_word_embeddings=False)


@pytest.mark.parametrize("variant", [{}, {"share_emb": True, "swiglu": True}, {"output_size": 7}])
@pytest.mark.parametrize("shards", [False, True])
def test_round_trip(tmp_path: Path, variant: dict[str, Any], shards: bool) -> None:
    model, model_hf = wrapped(**variant)
    tokens = random_tokens(2, 9)
    model_hf.save_pretrained(tmp_path, **({"max_shard_size": "4KB"} if shards else {}))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 if shards else True
    assert isinstance(transformers.AutoConfig.from_pretrained(tmp_path), MegalodonHfConfig)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, MegalodonForCausalLM)
    assert not loaded.training
    assert torch.equal(loaded(tokens).logits, model(tokens))
    assert loaded.model.config == model.config
    same = loaded.model.output.output.weight is loaded.model.embed.weight
    assert same == model.config.share_emb


def test_convert_there_and_back(tmp_path: Path) -> None:
    """A run on bytes to a transformers folder, tokenizer and all, and back to our file."""
    pytest.importorskip("typer")
    from megalodon_ops import cli

    model = small_model(dtype=F32, vocab_size=256).eval()
    save_checkpoint(model, tmp_path / "a.safetensors")
    there = ["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "hf"), "--format", "hf"]
    assert cli.main(there) == 0
    (tmp_path / "new").touch()
    mode = (tmp_path / "new").stat().st_mode
    assert {file.stat().st_mode for file in (tmp_path / "hf").iterdir()} == {mode}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = random_tokens(2, 9)
    assert torch.equal(loaded(tokens).logits, model(tokens))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("é")["input_ids"] == list("é".encode())
    assert cli.main(["convert", str(tmp_path / "hf"), str(tmp_path / "b.safetensors")]) == 0
    back = load_checkpoint(tmp_path / "b.safetensors", config=model.config)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name
    with pytest.raises(ValueError, match="another model than config="):
        load_checkpoint(tmp_path / "hf", config=small_config())


def test_export_with_a_tokenizer_file(tmp_path: Path) -> None:
    from test_tokenizer import byte_level, sentence_piece

    from megalodon_ops.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(byte_level(tmp_path / "t.json"))
    model = small_model(dtype=F32, vocab_size=tokenizer.vocab_size)
    hf.export(model, tmp_path / "hf", tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs("the quick é")["input_ids"] == tokenizer.encode("the quick é".encode())
    other = load_tokenizer(sentence_piece(tmp_path / "t.model"))
    with pytest.raises(ValueError, match=r"wanted bytes or a tokenizer.json; got tokenizer.model"):
        hf.export(model, tmp_path / "other", other)
    assert not (tmp_path / "other").exists()


def test_dtypes(tmp_path: Path) -> None:
    """The precision-sensitive parameters stay float32, as they do in `Megalodon.to`."""
    model, model_hf = wrapped(rescale_nffn=True)
    model_hf.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        loaded = MegalodonForCausalLM.from_pretrained(tmp_path, dtype=dtype).model
        want = load_dtype(model, dtype)
        for name, tensor in loaded.state_dict().items():
            assert tensor.dtype == want[name].dtype, name
            assert torch.equal(tensor, want[name]), name


def load_dtype(model: Megalodon, dtype: torch.dtype) -> dict[str, Tensor]:
    copy = Megalodon(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.to(dtype).state_dict()


def test_loading_is_strict(tmp_path: Path) -> None:
    _, model_hf = wrapped()
    model_hf.save_pretrained(tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    weights, fields = safetensors_torch.load_file(file), json.loads(config.read_text())
    name = "model.layers.1.mega.wz.weight"

    def loading(changed: dict[str, Tensor], **values: Any) -> None:
        safetensors_torch.save_file(changed, file, {"format": "pt"})
        config.write_text(json.dumps(fields | values))
        MegalodonForCausalLM.from_pretrained(tmp_path)

    loading(weights)
    with pytest.raises(ValueError, match=f"missing keys: {name}"):
        loading({key: value for key, value in weights.items() if key != name})
    with pytest.raises(ValueError, match=r"unexpected keys: model\.odd"):
        loading(weights | {"model.odd": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"mismatch|size"):
        loading(weights | {name: torch.zeros(3, 12)})
    with pytest.raises(ValueError, match="overflow"):
        loading(weights, model_dim=3 * 2**40)
    with pytest.raises(ValueError, match=r"rope_base about 10000; the config has rope_base = 5"):
        loading(weights, rope_base=5.0)
    config.write_text("[" * 100_000)
    for load in (MegalodonForCausalLM.from_pretrained, load_checkpoint):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
            load(tmp_path)


def test_a_model_can_be_made_from_a_configuration_alone() -> None:
    config = MegalodonHfConfig.from_core(small_config())
    model = transformers.AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    want = Megalodon(small_config())
    torch.manual_seed(0)
    got = MegalodonForCausalLM(config)
    assert isinstance(model, MegalodonForCausalLM)
    for name, tensor in want.state_dict().items():
        assert torch.equal(tensor, got.model.state_dict()[name]), name


# Forward


@pytest.mark.parametrize("outputs", [None, 7, 15])
def test_loss_and_gradients_are_the_models(outputs: int | None) -> None:
    model, model_hf = wrapped(output_size=outputs)
    tokens = random_tokens(2, 9) % (outputs or VOCAB)
    model_hf.train()
    out = model_hf(tokens, labels=tokens)
    assert out.cache is None
    logits = model(tokens)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(out.loss, loss)
    (gradient,) = torch.autograd.grad(out.loss, [model.embed.weight])
    (want,) = torch.autograd.grad(loss, [model.embed.weight])
    torch.testing.assert_close(gradient, want)
    assert isinstance(model_hf(tokens, return_dict=False), tuple)


@pytest.mark.parametrize("grad", [False, True])
def test_the_cache_carries_the_state(grad: bool) -> None:
    model, model_hf = wrapped()
    tokens = random_tokens(2, 11)
    with torch.set_grad_enabled(grad):
        out = model_hf(tokens[:, :6], use_cache=True)
        assert out.cache.get_seq_length() == 6
        old_name = {"past_key_values": out.cache} if grad else {"cache": out.cache}
        rest = model_hf(tokens[:, 6:], use_cache=True, **old_name)
        assert rest.cache.get_seq_length() == 11
        torch.testing.assert_close(torch.cat([out.logits, rest.logits], 1), model(tokens))
        assert rest.cache.state.position.tolist() == [11, 11]
        assert model_hf(tokens, use_cache=False).cache is None


@pytest.mark.parametrize("prefill", [1, 3, 2048])
def test_a_long_prompt_is_run_in_pieces(monkeypatch: pytest.MonkeyPatch, prefill: int) -> None:
    monkeypatch.setattr(modeling, "PREFILL", prefill)
    model, model_hf = wrapped()
    tokens = random_tokens(2, 11)
    with torch.no_grad():
        want = model(tokens)
        for keep in (1, 4, 11, 99):
            out = model_hf(tokens, logits_to_keep=keep)
            torch.testing.assert_close(out.logits, want[:, -keep:])
            assert out.cache.state.position.tolist() == [11, 11]
        picked = model_hf(tokens, logits_to_keep=torch.tensor([2, 5])).logits
        torch.testing.assert_close(picked, want[:, [2, 5]])


MASKS = {
    "left": [[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]],
    "right": [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]],
    "inside": [[0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 1, 1], [1, 1, 1, 0, 0, 1]],
    "a row of padding alone": [[0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]],
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("grad", [False, True])
def test_padding_is_skipped(kind: str, grad: bool) -> None:
    """Each row is as it would be alone, its state included, whichever token fills the padding."""
    model, model_hf = wrapped()
    mask = torch.tensor(MASKS[kind])
    tokens, more = random_tokens(3, 6), random_tokens(3, 2, seed=1)
    with torch.set_grad_enabled(grad):
        out = model_hf(tokens, attention_mask=mask, use_cache=True)
        for keep in (1, 2):
            last = model_hf(tokens, attention_mask=mask, logits_to_keep=keep).logits
            torch.testing.assert_close(last, out.logits[:, -keep:])
        other = model_hf(tokens.where(mask.bool(), 0), attention_mask=mask, use_cache=False)
        torch.testing.assert_close(other.logits, out.logits)
        both = torch.cat([mask, torch.ones(3, 2, dtype=torch.int64)], 1)
        after = model_hf(more, attention_mask=both, cache=out.cache).logits
        for row in range(3):
            alone = tokens[row][mask[row].bool()][None]
            want, state = model(alone, return_state=True)
            columns = mask[row].cumsum(0) - 1
            for column, index in enumerate(columns.tolist()):
                expected = want[0, index] if index >= 0 else torch.zeros(VOCAB)
                torch.testing.assert_close(out.logits[row, column], expected)
            torch.testing.assert_close(after[row], model(more[row : row + 1], state)[0])


def test_bad_arguments() -> None:
    model, model_hf = wrapped()
    tokens = random_tokens(2, 5)
    with pytest.raises(ValueError, match=r"attention_mask: wanted \[2, 5\] or more .*got \[2, 4\]"):
        model_hf(tokens, attention_mask=torch.ones(2, 4))
    with pytest.raises(TypeError, match="cache: wanted a MegalodonCache; got MegalodonState"):
        model_hf(tokens, cache=model.init_state(2))
    with pytest.raises(ValueError, match="state: batch: wanted 2 rows"):
        model_hf(tokens, cache=MegalodonCache(model.init_state(3)))
    with pytest.raises(ValueError, match="inputs_embeds: not supported"):
        model_hf(tokens, inputs_embeds=torch.zeros(2, 5, 12))
    with pytest.raises(ValueError, match="position_ids: not supported"):
        model_hf(tokens, position_ids=tokens)
    with pytest.raises(TypeError, match="unexpected arguments: wheels"):
        model_hf(tokens, wheels=4)
    with pytest.raises(NotImplementedError, match="resize_token_embeddings"):
        model_hf.resize_token_embeddings(20)


# Generation


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_is_our_decoding(use_cache: bool) -> None:
    """Past several chunk boundaries (chunks of 4)."""
    model, model_hf = wrapped()
    prompt = random_tokens(3, 5)
    out = model_hf.generate(prompt, max_new_tokens=15, do_sample=False, use_cache=use_cache)
    assert torch.equal(out, greedy(model, prompt, 15))


def test_generation_with_left_padding_is_that_of_each_row() -> None:
    model, model_hf = wrapped()
    tokens = random_tokens(3, 6)
    mask = torch.tensor(MASKS["left"])
    out = model_hf.generate(tokens, attention_mask=mask, max_new_tokens=9, do_sample=False)
    for row in range(3):
        alone = greedy(model, tokens[row][mask[row].bool()][None], 9)
        assert torch.equal(out[row, 6:], alone[0, -9:])


def test_generation_with_right_padding_goes_on_after_the_text() -> None:
    model, model_hf = wrapped()
    tokens = random_tokens(3, 6)
    mask = torch.tensor(MASKS["right"])
    out = model_hf.generate(tokens, attention_mask=mask, max_new_tokens=9, do_sample=False)
    for row in range(3):
        alone = greedy(model, tokens[row][mask[row].bool()][None], 9)
        assert torch.equal(out[row, 6:], alone[0, -9:])


def test_outputs_that_are_no_tokens_are_not_generated() -> None:
    _, model_hf = wrapped(output_size=VOCAB + 1)
    with pytest.raises(ValueError, match=r"output_size: wanted at most vocab_size = 11, .* got 12"):
        model_hf.generate(random_tokens(1, 3), max_new_tokens=2)


def test_beam_search_with_and_without_the_cache() -> None:
    """The state's rows are reordered with the beams; without a cache nothing has to be."""
    _, model_hf = wrapped()
    prompt = random_tokens(2, 5)
    options = {"max_new_tokens": 10, "num_beams": 4, "num_return_sequences": 3, "do_sample": False}
    cached = model_hf.generate(prompt, **options)
    assert torch.equal(cached, model_hf.generate(prompt, use_cache=False, **options))
    assert cached.shape == (6, 15)
    assert not torch.equal(cached[0], cached[1])


def test_generation_goes_on_from_a_cache() -> None:
    """A dialogue: only the tokens that the cache has not seen are passed."""
    model, model_hf = wrapped()
    prompt = random_tokens(1, 7)
    cache = MegalodonCache()
    first = model_hf.generate(prompt, cache=cache, max_new_tokens=5, do_sample=False)
    assert cache.state is not None
    # The last token that was made has not been read yet.
    assert cache.state.position.tolist() == [11]
    more = torch.cat([first[:, -1:], random_tokens(1, 3, seed=2)], 1)
    second = model_hf.generate(more, cache=cache, max_new_tokens=6, do_sample=False)
    whole = greedy(model, torch.cat([first[:, :-1], more], 1), 6)
    assert torch.equal(second[:, -6:], whole[:, -6:])


def test_a_saved_state_is_a_cache(tmp_path: Path) -> None:
    model, model_hf = wrapped()
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        model(tokens[:, :6], return_state=True)[1].save(tmp_path / "state.safetensors")
    state = MegalodonState.load(tmp_path / "state.safetensors", model.config)
    out = model_hf.generate(
        tokens[:, 6:], cache=MegalodonCache(state), max_new_tokens=4, do_sample=False
    )
    assert torch.equal(out[:, -4:], greedy(model, tokens, 4)[:, -4:])


def test_sampling_is_reproducible_and_returns_many() -> None:
    _, model_hf = wrapped()
    outs = []
    for seed in (1, 1, 2):
        transformers.set_seed(seed)
        outs.append(
            model_hf.generate(
                random_tokens(1, 4), do_sample=True, num_return_sequences=3, max_new_tokens=12
            )
        )
    assert outs[0].shape == (3, 16)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_what_a_state_cannot_do() -> None:
    _, model_hf = wrapped()
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model_hf.generate(random_tokens(1, 4), prompt_lookup_num_tokens=2, max_new_tokens=4)


# The byte tokenizer and the pipeline


def test_byte_tokenizer(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    text = "def f(x):\n\treturn 'é€😀' \x7f  "
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert len(tokenizer) == 256
    batch = tokenizer(["abc", "a"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[97, 98, 99], [0, 0, 97]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again(text)["input_ids"] == list(text.encode())
    assert again.padding_side == "left"


def test_pipeline_on_a_trained_model(tmp_path: Path) -> None:
    for needed in ("typer", "rich", "matplotlib"):
        pytest.importorskip(needed)
    from megalodon_ops import Sampling, cli, generate

    (tmp_path / "text").write_text("the quick brown fox\n" * 200)
    sizes = "--model-dim=16 --num-layers=2 --z-dim=8 --value-dim=12 --ffn-hidden-dim=16"
    sizes += " --cema-ndim=2 --chunk-size=8 --norm-num-groups=4"
    arguments = ["train", "--out", str(tmp_path / "run"), "--data", str(tmp_path / "text")]
    arguments += [*sizes.split(), "--seq-len=40", "--batch-size=4", "--dtype=float32"]
    assert cli.main([*arguments, "--steps=40", "--lr=0.02", "--warmup-steps=3"]) == 0

    model = load_checkpoint(tmp_path / "run")
    MegalodonForCausalLM.wrap(model).save_pretrained(tmp_path / "hf")
    byte_tokenizer().save_pretrained(tmp_path / "hf")
    pipeline = transformers.pipeline("text-generation", model=str(tmp_path / "hf"))
    prompts = ["the quick", "the quick brown f"]
    made = pipeline(prompts, max_new_tokens=12, do_sample=False, batch_size=2)
    for prompt, result in zip(prompts, made, strict=True):
        ours = generate(model, [prompt.encode()], 12, Sampling(0))[0].tokens
        text = prompt + bytes(ours).decode(errors="replace")
        assert result[0]["generated_text"] == text
