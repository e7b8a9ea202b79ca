"""Families beyond the first two: LLaVA-1.5, LLaVA-NeXT-Video and BLIP, as their checkpoints come and as methods meet them."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import for_generate, load_mini
from vlmbench.engine import generate
from vlmbench.errors import UsageError
from vlmbench.methods.full import Full
from vlmbench.methods.turbo import Turbo
from vlmbench.models.base import Features
from vlmbench.models.loading import load
from vlmbench.suite import Caption
from vlmbench.trace import Trace

QUESTION = "where is the red circle ?"
BLIPS = ("mini-blip-vqa@random", "mini-blip-captioning@random", "mini-blip-itm@random")
WORDS = torch.tensor([[5, 17, 40, 3]])
"""A question, or a caption, in BLIP's tokens."""


# BLIP: three heads over one tower.


def answer(model: Any, pixels: Tensor, words: Tensor = WORDS) -> Tensor:
    """What the stock model's own head says: tokens' logits, or the two of matching."""
    kind = type(model).__name__
    words = words.expand(len(pixels), -1)
    if kind == "BlipForConditionalGeneration":
        return model(pixel_values=pixels, input_ids=words).logits
    if kind == "BlipForImageTextRetrieval":
        return model(pixel_values=pixels, input_ids=words).itm_score
    options = {"max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    return torch.stack(model.generate(pixel_values=pixels, input_ids=words, **options).logits, 1)


@pytest.fixture(params=BLIPS)
def blip(request: pytest.FixtureRequest) -> Any:
    """BLIP's initial weights are nearly zero (its paper's training starts elsewhere): here they are large enough to matter."""
    adapter = load_mini(request.param)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return adapter


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_blip_under_the_named_attention_is_the_stock_model(blip: Any, pixels: Tensor, attention: str) -> None:
    config = deepcopy(blip.config)
    config._attn_implementation = "eager"
    ours = type(blip.model)(config).eval()
    ours.load_state_dict(blip.model.state_dict())
    with blip.attention(attention):
        torch.testing.assert_close(answer(blip.model, pixels), answer(ours, pixels), rtol=0, atol=1e-4)
    assert blip.attention_names()[1] == "sdpa"


@torch.inference_mode()
@pytest.mark.parametrize("mode", ["unmerge", "drop"])
def test_turbo_that_merges_nothing_leaves_every_head_as_it_is(blip: Any, pixels: Tensor, mode: Any) -> None:
    plain = answer(blip.model, pixels)
    with Turbo(r=0, mode=mode).attach(blip):
        same = answer(blip.model, pixels)
    torch.testing.assert_close(same, plain, rtol=0, atol=1e-4)
    assert torch.equal(answer(blip.model, pixels), plain)


@torch.inference_mode()
def test_every_head_of_blip_looks_at_what_turbo_leaves(blip: Any, pixels: Tensor) -> None:
    """As published: the text model gets the shorter sequence, its attention is not weighted by mass."""
    method = Turbo(r=2, min_tokens=0, mode="drop")
    method.check(blip)
    plain = answer(blip.model, pixels)
    with method.attach(blip):
        left = blip.model.vision_model(pixels).last_hidden_state
        changed = answer(blip.model, pixels)
        alone = answer(blip.model, pixels[1:2])
    assert left.shape == (3, 17 - 3 * 2, 32)
    assert not torch.allclose(changed, plain, atol=1e-3)
    torch.testing.assert_close(changed[1:2], alone, rtol=0, atol=1e-4)  # pictures of a batch do not meet
    # The head is the stock one over the shorter sequence, whoever made it.
    hook = blip.model.vision_model.register_forward_hook(lambda m, a, out: replace(out, last_hidden_state=left))
    torch.testing.assert_close(answer(blip.model, pixels), changed, rtol=0, atol=1e-4)
    hook.remove()


@torch.inference_mode()
def test_unmerged_blip_has_every_token_again(blip: Any, pixels: Tensor) -> None:
    with Turbo(r=2, min_tokens=0).attach(blip):
        whole = blip.model.vision_model(pixels).last_hidden_state
    with Turbo(r=2, min_tokens=0, mode="drop").attach(blip):
        left = blip.model.vision_model(pixels).last_hidden_state
    assert whole.shape == (3, 17, 32)
    assert torch.equal(whole[:, 0], left[:, 0])  # the class token
    for picture in range(3):
        assert {tuple(row) for row in whole[picture].tolist()} == {tuple(row) for row in left[picture].tolist()}


def test_blip_is_timed_and_not_run(cli: Any, tmp_path: Path) -> None:
    says = "BLIP looks at a picture by cross-attention"
    name = "mini-blip-vqa@random"
    done = cli("run", "--model", name, "--limit", 1, "--method", "turbo:r=2", "--out", tmp_path)
    assert (done.code, says in done.err) == (2, True)
    assert cli("plan", "--model", name, "--method", "full", "--tokens", 500, "--device", "h200").code == 2
    args = ("--shape", "mini-blip-vqa", "--frames", 4, "--rounds", 2, "--format", "json")
    assert cli("bench", "prefill", *args, "--method", "uniform:ratio=0.5").code == 2
    done = cli("bench", "vision", *args, "--method", "turbo:r=2,min_tokens=0,mode=drop")
    assert done.code == 0, done.err
    (row,) = json.loads(done.out)["rows"]
    assert row["frame_tokens"] == 17
    assert row["method_flops"] < row["dense_flops"]
    for spec in (Turbo(text_step=0.1), Turbo(video="shared")):
        with pytest.raises(UsageError, match="act on visual tokens in a prompt, which blip has none of"):
            spec.check(load_mini(name))


# LLaVA-1.5: the class-token form of Turbo, and a video as pictures.


@pytest.fixture
def llava_15() -> Any:
    """Made outside inference mode, whatever a test is in: it is the process's own."""
    return load_mini("mini-llava-1.5@random")


@torch.inference_mode()
def test_llava_15_reads_the_tokens_that_its_tower_merged(llava_15: Any, clip: Any) -> None:
    """Each is the projection of a unit of the tower, at its own place; no class token, no copy."""
    adapter = llava_15
    for media in ([clip(4)], [clip(1, "image"), clip(2), clip(1, "image")]):
        inputs = adapter.inputs(media, QUESTION)
        frames = sum(len(each.frames) for each in media)
        with Turbo(r=3, min_tokens=0).attach(adapter) as trace:
            trace.reset("sample")
            whole = adapter.splice(inputs, adapter.encode_vision(inputs))
            calls = trace.scratch["turbo"].calls
        method = Turbo(r=3, min_tokens=0, mode="drop")
        with method.attach(adapter) as trace:
            trace.reset("sample")
            less = method.prepare(adapter.splice(inputs, adapter.encode_vision(inputs)), trace)
        assert {call.kind for call in calls} == {each.kind for each in media}
        visual = whole.layout.indices("video", "image").tolist()
        if {each.kind for each in media} == {"video"}:  # towers take all pictures first
            assert [visual[unit] for unit in trace.kept["vision"]] == [i for i in trace.kept["prompt"] if i in visual]
        kept = trace.kept["prompt"]
        assert less.layout.n_visual == frames * (16 - 2 * 3)
        assert torch.equal(less.embeds, whole.embeds[:, kept])
        spans = [span for span in whole.layout if span.kind != "text"]
        for before, after in zip(spans, [s for s in less.layout if s.kind != "text"], strict=True):
            rows = whole.embeds[0, before.start : before.stop]
            assert (before.media, before.frame) == (after.media, after.frame)
            assert len({tuple(row) for row in rows.tolist()}) == len(after)


def test_llava_15_refuses_features_that_are_not_the_patches_tokens() -> None:
    adapter = load_mini("mini-llava-1.5@random")
    adapter.config.vision_feature_select_strategy = "full"
    try:
        with pytest.raises(UsageError, match=r"vision_feature_select_strategy=full .* class token"):
            type(adapter)(adapter.model, adapter.processor)
    finally:
        adapter.config.vision_feature_select_strategy = "default"


# Checkpoints as they are published.

OFFICIAL_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""As the published processors have it: pictures, then videos, then text, whatever their order was."""


def published(name: str, folder: Path) -> Path:
    """A miniature with the files, field names and tensor names that the published checkpoint has."""
    adapter = load_mini(name)
    tokenizer = adapter.processor.tokenizer
    adapter.processor.save_pretrained(folder)
    vision, text = adapter.config.vision_config, adapter.config.text_config
    common = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    config = {
        "architectures": [type(adapter.model).__name__],
        "model_type": adapter.config.model_type,
        "ignore_index": -100,
        "image_token_index": adapter.config.image_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "torch_dtype": "float16",
        "tie_word_embeddings": False,
        "text_config": {
            **{key: getattr(text, key) for key in (*common, "num_key_value_heads", "max_position_embeddings")},
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "rms_norm_eps": text.rms_norm_eps,
            "vocab_size": text.vocab_size,
            "eos_token_id": tokenizer.eos_token_id,
        },
        "vision_config": {
            **{key: getattr(vision, key) for key in (*common, "image_size", "patch_size")},
            "model_type": "clip_vision_model",
            "projection_dim": 768,
            "vocab_size": 32000,
        },
    }
    if "video" in name:
        config |= {
            "video_token_index": adapter.config.video_token_id,
            "image_grid_pinpoints": adapter.config.image_grid_pinpoints,
            "spatial_pool_mode": "average",
            "spatial_pool_stride": 2,
            "use_image_newline_parameter": True,
        }
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("chat_template.jinja", "chat_template.json"):
        (folder / file).unlink(missing_ok=True)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": OFFICIAL_TEMPLATE}))
    from safetensors.torch import save_file

    names = {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.image_newline": "image_newline",
        "lm_head.": "language_model.lm_head.",
    }

    def old(key: str) -> str:
        found = next(new + key.removeprefix(now) for now, new in names.items() if key.startswith(now))
        return found.replace("vision_model.vision_model.", "vision_model.")

    tensors = {old(key): tensor.contiguous() for key, tensor in adapter.model.state_dict().items()}
    half = len(tensors) // 2
    index: dict[str, str] = {}
    for number, keys in enumerate((list(tensors)[:half], list(tensors)[half:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({key: tensors[key] for key in keys}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(keys, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


@pytest.mark.parametrize("name", ["mini-llava-1.5@random", "mini-llava-next-video@random"])
def test_a_published_checkpoints_files_load_and_answer_as_the_stock_model(name: str, clip: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = published(name, tmp_path / "model")
    ours = load(str(folder), dtype=torch.float32, device="cpu", attention="sdpa").adapter
    stock = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    for media in ([clip(1, "image")], [clip(4)]):
        done = generate(ours, Full(), Trace(), media, QUESTION, max_new_tokens=6, stop_at_eos=False)
        kind, marks = ("image", "<image>\n") if media[0].kind == "image" else ("video", "<video>\n")
        frames = [torch.from_numpy(each).permute(2, 0, 1) for each in media[0].frames]
        if kind == "video" and "video" not in name:
            kind, marks = "image", "<image>\n" * len(frames)
        text = f"USER: {marks}{QUESTION} ASSISTANT:"
        given = {"images": frames} if kind == "image" else {"videos": [torch.stack(frames)]}
        inputs = processor(text=[text], return_tensors="pt", **given)
        own = for_generate(ours.inputs(media, QUESTION))
        assert own.keys() == inputs.keys()
        for key in own:
            torch.testing.assert_close(own[key], inputs[key], rtol=0, atol=0)
        with torch.inference_mode():
            theirs = stock.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None)
            logits = stock(**inputs).logits[0, -1]
        torch.testing.assert_close(done.first_logits, logits, rtol=0, atol=1e-5)
        assert done.token_ids == theirs[0, inputs["input_ids"].shape[1] :].tolist()


def test_a_template_that_sorts_media_before_text_does_not_sort_ours(clip: Any, tmp_path: Path) -> None:
    """Else captions would stand behind all frames, and pictures before every video, without a word."""
    folder = published("mini-llava-next-video@random", tmp_path / "model")
    adapter = load(str(folder), dtype=torch.float32, device="cpu", attention="sdpa").adapter
    written, _ = adapter._written([clip(6)], QUESTION, [Caption(0.9, "the cat"), Caption(9.0, "the end")])
    assert written == f"USER: <video>\nthe cat\n<video>\nthe end\n{QUESTION} ASSISTANT:"
    written, _ = adapter._written([clip(6), clip(1, "image")], QUESTION, [])
    assert written == f"USER: <video>\n<image>\n{QUESTION} ASSISTANT:"
    layout = adapter.splice(adapter.inputs([clip(6), clip(1, "image")], QUESTION), Features()).layout
    assert [span.kind for span in layout if span.kind != "text"] == ["video"] * 6 + ["image"]


@pytest.mark.parametrize("name", BLIPS)
def test_a_blip_checkpoint_loads_with_its_own_head(name: str, pixels: Tensor, tmp_path: Path) -> None:
    adapter = load_mini(name)
    adapter.model.save_pretrained(tmp_path / "model")
    adapter.processor.save_pretrained(tmp_path / "model")
    loaded = load(str(tmp_path / "model"), dtype=torch.float32, device="cpu", attention="sdpa").adapter
    assert type(loaded.model) is type(adapter.model)
    with torch.inference_mode():
        torch.testing.assert_close(answer(loaded.model, pixels), answer(adapter.model, pixels), rtol=0, atol=1e-5)


# What takes what.


def test_the_page_of_families_is_true() -> None:
    from vlmbench.families import FAMILIES, to_markdown
    from vlmbench.models.loading import families

    assert to_markdown() == Path("docs/families.md").read_text(encoding="utf-8"), (
        "write it again: python -m vlmbench.families > docs/families.md"
    )
    asked = {type(load_mini(f"{each.preset}@random")).name for each in FAMILIES}
    assert asked == set(families.names())


def test_shapes_without_a_class_of_their_own_count_the_published_tokens(cli: Any) -> None:
    for model, frames, per_frame in (("longvila-7b", 2, 257), ("llava-video-7b", 2, 210), ("llava-1.5-7b", 1, 576)):
        args = ("--model", model, "--method", "full", "--tokens", 700, "--device", "h200", "--format", "json")
        done = cli("plan", *args, "--frame-tokens", per_frame)
        assert done.code == 0, done.err
        assert {(row["frame_tokens"], row["visual_tokens"]) for row in json.loads(done.out)["rows"]} == {
            (per_frame, frames * per_frame)
        }
