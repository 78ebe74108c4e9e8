"""What every head does, alone and in the model of all heads: a test class to inherit."""

import copy
import pickle

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import HEADS, batch, lively, very_tiny_config

from unihema.modeling_unihema.modeling_unihema import UniHemaForMultiTask


# Fewer queries than tokens, as in the real presets.
CONFIG = {"num_queries": 12}
# Linears of every head that an adapter may change.
ADAPTED = ["value_proj", "linear1", "q_proj", "q", "v"]


def tensors(output) -> dict[str, torch.Tensor]:
    """The tensors of an output, but for the loss."""
    return {name: value for name, value in output.items() if isinstance(value, torch.Tensor) and name != "loss"}


def assert_same(found, expected, atol: float = 0.0):
    """Checks that two outputs hold the same tensors."""
    found, expected = tensors(found), tensors(expected)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name].float(), expected[name].float(), rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def primary(output) -> torch.Tensor:
    """What the head answers."""
    return output.mask_logits if "mask_logits" in output else output.logits


def differ(found, expected, atol: float = 1e-4) -> bool:
    """Whether two answers are not the same one."""
    return (primary(found).float() - primary(expected).float()).abs().max() > atol


class HeadBehaviour:
    """Tests of one head; a class for each head inherits them.

    Attributes:
        task (`str`): The task.
        model_class (`type`): A class that has its head.
        layer_shapes (`dict[str, list[tuple[int, ...]]]`): States and attentions of the layers, with `CONFIG`.
    """

    task: str
    model_class: type
    layer_shapes: dict[str, list[tuple[int, ...]]]

    def make(self, attention: str = "sdpa", **options):
        """The model, seeded and in evaluation mode."""
        torch.manual_seed(0)
        config = very_tiny_config(**{**CONFIG, **options})
        return lively(self.model_class._from_config(config, attn_implementation=attention)).eval()

    def batch(self, **options) -> dict:
        """What the head is trained with."""
        return self._named(batch(self.task, **options))

    def inputs(self, **options) -> dict:
        """What the head answers."""
        inputs = batch(self.task, **options)
        labels = inputs.pop("labels")
        if self.task in ("question_answering", "cloze"):
            inputs["decoder_input_ids"] = labels.clamp(min=0)
        return self._named(inputs)

    def exportable(self, **options) -> dict:
        """What the head answers in an exported graph, which returns no keys and values of T5."""
        inputs = self.inputs(**options)
        return {**inputs, "use_cache": False} if "decoder_input_ids" in inputs else inputs

    def _named(self, inputs: dict) -> dict:
        return {**inputs, "task": self.task} if self.model_class is UniHemaForMultiTask else inputs

    def trained(self, model) -> dict[str, torch.nn.Parameter]:
        """The parameters that the loss of the task teaches."""
        alone = HEADS.get(self.task, HEADS["question_answering"])(model.config)
        names = {name for name, parameter in alone.named_parameters() if parameter.requires_grad}
        return {name: parameter for name, parameter in model.named_parameters() if name in names}

    def with_adapter(self, model, **options):
        """The model with LoRA in it, which changes its answers."""
        torch.manual_seed(3)
        settings = {"r": 2, "target_modules": ADAPTED, "init_lora_weights": False, **options}
        model.add_adapter(peft.LoraConfig(**settings), "one")
        return model.eval()

    def save_and_load(self, model, folder, **options):
        """The model from a file."""
        model.save_pretrained(folder)
        return self.model_class.from_pretrained(folder, **options)

    # Answers.

    @torch.no_grad()
    def test_same_input_gives_the_same_output(self):
        model = self.make()
        assert_same(model(**self.inputs()), model(**self.inputs()))
        assert_same(self.make()(**self.inputs()), model(**self.inputs()))

    @torch.no_grad()
    def test_an_image_does_not_see_the_others_of_its_batch(self):
        model, inputs = self.make(), self.inputs(images=3)
        together = tensors(model(**inputs))
        for row in range(3):
            own = {n: v[row : row + 1] if torch.is_tensor(v) else v for n, v in inputs.items()}
            for name, value in tensors(model(**own)).items():
                torch.testing.assert_close(value[0], together[name][row], rtol=0, atol=2e-5)

    @torch.no_grad()
    def test_eager_and_sdpa_attention_agree_and_are_changed_without_loading_again(self):
        model = self.make("sdpa")
        expected = model(**self.inputs())
        assert_same(self.make("eager")(**self.inputs()), expected, atol=2e-5)
        model.set_attn_implementation("eager")
        assert {part.config._attn_implementation for part in model.modules() if hasattr(part, "config")} == {"eager"}
        assert_same(model(**self.inputs()), expected, atol=2e-5)

    @torch.no_grad()
    def test_tuple_on_request(self):
        model = self.make()
        found = model(**self.inputs(), return_dict=False)
        assert isinstance(found, tuple)
        torch.testing.assert_close(found[0], model(**self.inputs())[0], rtol=0, atol=0)

    @torch.no_grad()
    def test_states_and_attentions_of_every_layer_on_request(self):
        model, inputs = self.make("eager"), self.inputs()
        plain = model(**inputs)
        output = model(**inputs, output_hidden_states=True, output_attentions=True)
        torch.testing.assert_close(primary(output), primary(plain), rtol=0, atol=1e-6)
        layers = {name for name, value in output.items() if isinstance(value, tuple)}
        assert layers == set(self.layer_shapes) and not layers & set(plain)
        for name, shapes in self.layer_shapes.items():
            assert [tuple(value.shape) for value in output[name]] == shapes, name
            if name.endswith("attentions"):
                # Sampling weights sum to one over levels and points, other weights over what is attended to.
                over = (-2, -1) if len(shapes[0]) == 5 else -1
                assert all(torch.allclose(w.sum(over), torch.ones(()), atol=1e-5) for w in output[name])
        assert set(model(**inputs, output_hidden_states=True)) - set(plain) == {n for n in layers if "states" in n}

    @torch.no_grad()
    def test_evaluation_leaves_no_trace_of_training(self):
        """BatchNorm statistics and dropout are those of training only while training."""
        model = self.make(dropout=0.3)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assert_same(model(**self.inputs()), model(**self.inputs()))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    # Features given.

    @torch.no_grad()
    def test_features_of_the_image_stand_for_its_pixels(self):
        model, inputs = self.make(), self.inputs()
        expected = model(**inputs)
        image = {name: inputs.pop(name) for name in ("pixel_values", "pixel_mask")}
        for task in (None, self.task):
            features = model.get_image_features(**image, task=task)
            for _ in range(2):
                assert_same(model(**inputs, image_features=features), expected)
        again = model(**inputs, image_features=features, output_hidden_states=True)
        assert_same(again, expected)
        states = [name for name in self.layer_shapes if "states" in name]
        assert [len(again[name]) for name in states] == [len(self.layer_shapes[name]) for name in states]

    @torch.no_grad()
    def test_an_image_is_given_once(self):
        model, inputs = self.make(), self.inputs()
        features = model.get_image_features(inputs["pixel_values"], inputs["pixel_mask"])
        with pytest.raises(ValueError, match="pixel_values or image_features, not both"):
            model(**inputs, image_features=features)
        del inputs["pixel_values"]
        with pytest.raises(ValueError, match="pixel_values is missing"):
            model(**inputs)

    # Saving and loading.

    @torch.no_grad()
    def test_save_and_load_whole_and_in_shards(self, tmp_path):
        model = self.make()
        expected = model(**self.inputs())
        model.save_pretrained(tmp_path / "whole")
        model.save_pretrained(tmp_path / "shards", max_shard_size="40kB")
        assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
        assert not list(tmp_path.rglob("*.bin"))
        for folder in ("whole", "shards"):
            loaded, report = self.model_class.from_pretrained(tmp_path / folder, output_loading_info=True)
            assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            assert not loaded.training
            assert_same(loaded(**self.inputs()), expected)

    @torch.no_grad()
    def test_copied_and_pickled_it_is_the_same(self):
        model = self.make()
        expected = model(**self.inputs())
        for another in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_same(another(**self.inputs()), expected)
            # Independent of the first: the copy's weights are its own.
            next(another.parameters()).add_(1)
        assert_same(model(**self.inputs()), expected)

    @torch.no_grad()
    def test_device_map_spreads_the_model_and_what_does_not_fit_goes_to_disk(self, tmp_path):
        model = self.make()
        expected = model(**self.inputs())
        placed = self.save_and_load(model, tmp_path, device_map="auto")
        assert_same(placed(**self.inputs()), expected)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        spread = self.model_class.from_pretrained(
            tmp_path, device_map="auto", max_memory={"cpu": int(0.9 * size)}, offload_folder=tmp_path / "offload"
        )
        assert {str(place) for place in spread.hf_device_map.values()} == {"cpu", "disk"}
        assert_same(spread(**self.inputs()), expected, atol=2e-5)

    def test_loading_draws_no_weight_that_is_in_the_file(self, tmp_path, monkeypatch):
        """Low memory and time: the model is made without storage and filled from the file."""
        model, drawn = self.make(), []
        for name in ("xavier_uniform_", "normal_", "trunc_normal_", "kaiming_uniform_"):
            draw = getattr(torch.nn.init, name)

            def watched(tensor, *arguments, _draw=draw, **options):
                if not getattr(tensor, "_is_hf_initialized", False) and tensor.device.type != "meta":
                    drawn.append(tuple(tensor.shape))
                return _draw(tensor, *arguments, **options)

            monkeypatch.setattr(torch.nn.init, name, watched)
        self.save_and_load(model, tmp_path)
        assert drawn == []

    def test_missing_weights_are_named_and_drawn_anew(self, tmp_path, loading_log):
        model = self.make()
        model.save_pretrained(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        lost = [name for name in state if name.startswith("model.visual_backbone.input_projection.0.0.")]
        save_file({name: value for name, value in state.items() if name not in lost}, tmp_path / "model.safetensors")
        loaded, report = self.model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert set(report["missing_keys"]) == set(lost)
        assert all(name in loading_log.text for name in lost)
        assert torch.isfinite(loaded.get_parameter(lost[0])).all()
        assert not torch.equal(loaded.get_parameter(lost[0]), model.get_parameter(lost[0]))

    @torch.no_grad()
    def test_weights_of_another_shape_stop_loading_unless_allowed(self, tmp_path, loading_log):
        model = self.make()
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            self.save_and_load(model, tmp_path, d_model=48)
        loaded = self.model_class.from_pretrained(tmp_path, d_model=48, ignore_mismatched_sizes=True)
        assert "Reinit due to size mismatch" in loading_log.text
        assert all(torch.isfinite(parameter).all() for parameter in loaded.parameters())
        loaded(**self.inputs())

    # Precision.

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @torch.no_grad()
    def test_half_precision_loaded_and_converted(self, dtype, tmp_path):
        model, inputs = self.make(), self.inputs()
        half = self.save_and_load(model, tmp_path, dtype=dtype)
        assert {p.dtype for p in half.parameters()} == {dtype}
        rounded = copy.deepcopy(half).float()
        coarse = {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}
        found = half(**coarse)
        assert all(torch.isfinite(value).all() for value in tensors(found).values())
        assert_same(model.to(dtype)(**coarse), found)
        assert_same(model.float()(**inputs), rounded(**inputs))
        half.save_pretrained(tmp_path / "half")
        assert self.model_class.from_pretrained(tmp_path / "half", dtype="auto").dtype == dtype
        assert self.model_class.from_pretrained(tmp_path / "half", dtype=torch.float32).dtype == torch.float32

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_trains(self, dtype):
        model = self.make().train()
        torch.manual_seed(1)
        expected = model(**self.batch()).loss
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=dtype):
            loss = model(**self.batch()).loss
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=0.1)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)

    # Training.

    def test_gradients_reach_every_trainable_parameter(self):
        model = self.make().train()
        model(**self.batch(size=(96, 128))).loss.backward()
        trained = self.trained(model)
        assert len(trained) > 50
        assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []

    def test_training_lowers_the_loss(self):
        model = self.make(denoising_queries=0, single_cell_dropout=0.0).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = model(**self.batch()).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing_computes_again_and_changes_nothing(self, reentrant):
        model = self.make(encoder_layers=2).train()
        layer = model.model.image_encoder.layers[1].self_attention if hasattr(model.model, "image_encoder") else None
        if self.task in ("question_answering", "cloze"):
            layer = model.model.text_branch.encoder.block[0].layer[0]

        def run() -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
            calls = []
            counted = layer.register_forward_pre_hook(lambda *_: calls.append(1))
            model.zero_grad(set_to_none=True)
            torch.manual_seed(1)
            loss = model(**self.batch()).loss
            loss.backward()
            counted.remove()
            return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, len(calls)

        loss, gradients, once = run()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        assert model.is_gradient_checkpointing
        loss_again, gradients_again, twice = run()
        assert (once, twice) == (1, 2)
        torch.testing.assert_close(loss_again, loss, rtol=1e-6, atol=0)
        assert gradients_again.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-4, atol=1e-5)
        model.gradient_checkpointing_disable()
        assert run()[2] == 1

    def test_an_adapter_is_trained_alone(self):
        model = self.make()
        with torch.no_grad():
            expected = model(**self.inputs())
        self.with_adapter(model, init_lora_weights=True)
        with torch.no_grad():
            assert_same(model(**self.inputs()), expected, atol=1e-6)
        model.train()
        model(**self.batch()).loss.backward()
        taught = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert taught and all("lora_B" in name for name in taught)

    @torch.no_grad()
    def test_an_adapter_is_switched_merged_and_taken_out_again(self):
        model, inputs = self.make(), self.inputs()
        base = model(**inputs)
        self.with_adapter(model)
        adapted = model(**inputs)
        assert differ(adapted, base)
        model.disable_adapters()
        assert_same(model(**inputs), base)
        model.enable_adapters()
        assert_same(model(**inputs), adapted)
        model.merge_adapter()
        assert_same(model(**inputs), adapted, atol=1e-4)
        model.unmerge_adapter()
        assert_same(model(**inputs), adapted, atol=1e-4)
        assert_same(model.merge_and_unload()(**inputs), adapted, atol=1e-4)

    # Tracing.

    @torch.no_grad()
    def test_exported_it_is_the_same(self):
        model, inputs = self.make(), self.exportable()
        program = torch.export.export(model, (), inputs, strict=False).module()
        assert_same(program(**inputs), model(**inputs), atol=2e-5)


class PromptedBehaviour(HeadBehaviour):
    """Tests of a head whose queries read a prompt."""

    @torch.no_grad()
    def test_features_of_the_prompt_stand_for_its_tokens(self):
        model, inputs = self.make(), self.inputs()
        expected = model(**inputs)
        text = {name: inputs.pop(name) for name in ("input_ids", "attention_mask")}
        prompt = model.get_prompt_features(**text)
        for _ in range(2):
            assert_same(model(**inputs, prompt_features=prompt), expected)
        default = model.get_prompt_features(task=self.task, batch_size=2)
        assert_same(model(**inputs, prompt_features=default), model(**inputs))
        image = {name: inputs.pop(name) for name in ("pixel_values", "pixel_mask")}
        features = model.get_image_features(**image)
        assert_same(model(**inputs, image_features=features, prompt_features=prompt), expected)

    @torch.no_grad()
    def test_one_prompt_for_all_images(self):
        model, inputs = self.make(), self.inputs()
        one = {name: inputs[name][:1].expand(2, -1) for name in ("input_ids", "attention_mask")}
        prompt = model.get_prompt_features(**{name: ids[:1] for name, ids in one.items()})
        given = {n: v for n, v in inputs.items() if n not in one}
        assert_same(model(**given, prompt_features=prompt), model(**{**inputs, **one}), atol=2e-5)

    @torch.no_grad()
    def test_a_prompt_is_given_once(self):
        model, inputs = self.make(), self.inputs()
        prompt = model.get_prompt_features(inputs["input_ids"], inputs["attention_mask"])
        with pytest.raises(ValueError, match="input_ids or prompt_features, not both"):
            model(**inputs, prompt_features=prompt)


class AnsweringBehaviour(HeadBehaviour):
    """Tests of a head that generates text."""

    @torch.no_grad()
    def test_answers_about_features_are_those_about_pixels(self):
        model, inputs = self.make(), self.inputs()
        inputs = {name: value for name, value in inputs.items() if name not in ("decoder_input_ids", "task")}
        for settings in ({}, {"num_beams": 3}):
            settings |= {"max_new_tokens": 5, "min_new_tokens": 5}
            expected = model.generate(**inputs, **settings).tolist()
            features = model.get_image_features(inputs["pixel_values"], inputs["pixel_mask"], task=self.task)
            text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            assert model.generate(**text, image_features=features, **settings).tolist() == expected

    @torch.no_grad()
    def test_the_text_alone_needs_no_image(self):
        model, inputs = self.make(), self.inputs()
        text = {name: value for name, value in inputs.items() if not name.startswith("pixel")}
        alone = model(**text, text_only=True)
        assert_same(model(**inputs, text_only=True), alone)
        assert differ(model(**inputs), alone)
        asked = {name: text[name] for name in ("input_ids", "attention_mask")}
        assert model.generate(**asked, text_only=True, max_new_tokens=3).shape[0] == 2

    @torch.no_grad()
    def test_a_text_is_needed(self):
        inputs = self.inputs()
        del inputs["input_ids"]
        with pytest.raises(ValueError, match="input_ids is missing"):
            self.make()(**inputs)

    def test_resized_vocabulary(self, tmp_path):
        model, inputs = self.make(), self.inputs()
        with torch.no_grad():
            before = model(**inputs).logits
            old = model.get_input_embeddings().weight.clone()
            model.resize_token_embeddings(70)
            after = model(**inputs).logits
        assert model.config.text_config.vocab_size == 70 and model.lm_head.out_features == 70
        assert after.shape[-1] == 70
        torch.testing.assert_close(after[..., :64], before, rtol=0, atol=0)
        torch.testing.assert_close(model.get_input_embeddings().weight[:64], old, rtol=0, atol=0)
        assert self.save_and_load(model, tmp_path).get_input_embeddings().num_embeddings == 70
        model.resize_token_embeddings(62)
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, before[..., :62], rtol=0, atol=1e-6)

    def test_resized_vocabulary_of_a_tied_output_layer_stays_tied(self):
        model = self.make(tie_word_embeddings=True)
        model.resize_token_embeddings(80)
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert model.lm_head.weight.shape[0] == 80


class OneHead:
    """Tests of a class that has one head only, and what is so slow to test that once a head is enough."""

    @torch.no_grad()
    def test_full_checkpoint_into_a_head_and_back_without_a_word(self, tmp_path, loading_log):
        torch.manual_seed(0)
        full = lively(UniHemaForMultiTask(very_tiny_config(**CONFIG))).eval()
        full.save_pretrained(tmp_path / "full")
        head = self.model_class.from_pretrained(tmp_path / "full")
        assert sum(p.numel() for p in head.parameters()) < sum(p.numel() for p in full.parameters())
        again = self.save_and_load(head, tmp_path / "head")
        assert_same(again(**self.inputs()), full(task=self.task, **self.inputs()))
        torch.testing.assert_close(
            again(**self.batch()).loss, full(task=self.task, **self.batch()).loss, rtol=0, atol=0
        )
        assert [record.message for record in loading_log.records if record.levelname == "WARNING"] == []
        # Back into the full model, only what the head does not have is missing, and is said to be.
        _, report = UniHemaForMultiTask.from_pretrained(tmp_path / "head", output_loading_info=True)
        assert set(report["missing_keys"]) == set(full.state_dict()) - set(head.state_dict())
        assert "LOAD REPORT" in loading_log.text and "MISSING" in loading_log.text

    def test_compiled_it_is_the_same_also_its_gradients(self):
        # Without a cache, for which T5 copies its configuration: PyTorch 2.8 cannot compile that.
        model, inputs = self.make(decoder_layers=1), self.exportable()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

        def run(call) -> tuple:
            model.zero_grad(set_to_none=True)
            output = call(**inputs)
            primary(output).square().mean().backward()
            return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

        torch.compiler.reset()
        expected, gradients = run(model)
        found, compiled_gradients = run(compiled)
        assert_same(found, expected, atol=2e-5)
        # Compiled, a parameter that the answer does not depend on may get a gradient of zeros.
        assert gradients.keys() <= compiled_gradients.keys()
        for name, gradient in compiled_gradients.items():
            torch.testing.assert_close(gradient, gradients.get(name, 0 * gradient), rtol=1e-3, atol=1e-4)

    @pytest.mark.slow
    @torch.no_grad()
    def test_compiled_to_machine_code_it_is_the_same(self):
        model = self.make()
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True)
        for size in ((64, 96), (96, 64)):
            inputs = self.inputs(size=size)
            assert_same(compiled(**inputs), model(**inputs), atol=1e-4)


class ExportsAnySize:
    """Tests of a head whose exported graph takes any number of images of any size."""

    # tests/api/test_onnx.py exports and runs two of them with any size among the fast tests.
    @pytest.mark.slow
    @torch.no_grad()
    def test_exported_with_any_batch_and_size(self):
        model = self.make()
        any_size = torch.export.Dim.DYNAMIC

        def inputs(**options) -> dict:
            return {name: value for name, value in self.exportable(**options).items() if name != "pixel_mask"}

        example = inputs(size=(192, 256))
        shapes = {name: {0: any_size, 1: any_size} if torch.is_tensor(v) else None for name, v in example.items()}
        shapes["pixel_values"] = {0: any_size, 2: any_size, 3: any_size}
        program = torch.export.export(model, (), example, dynamic_shapes=shapes, strict=False).module()
        for images, size in ((2, (192, 256)), (3, (70, 131))):
            other = inputs(images=images, size=size)
            assert_same(program(**other), model(**other), atol=2e-5)
