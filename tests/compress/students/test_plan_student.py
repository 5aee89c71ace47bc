import argparse
import dataclasses
import shlex
import tempfile
from pathlib import Path

import pytest
from transformers import AutoConfig, BertConfig, CLIPConfig, SiglipConfig, SiglipModel

from edgeclip.compress.built_in import BUILT_IN_TEACHER
from edgeclip.compress.cli import distill as distill_command
from edgeclip.compress.cli import plan_student as plan_student_command
from edgeclip.compress.students.image_families import IMAGE_FAMILIES, ImageFamilyName
from edgeclip.compress.students.plan_student import (
    StudentPlan,
    TeacherSizes,
    candidates,
    distill_options,
    plan_student,
    worth_showing,
)
from edgeclip.compress.students.student import StudentShape, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.profiles.predict.tower_shapes import ConvTower, TransformerTower
from edgeclip.runtime.errors import ConfigError, InputError
from edgeclip.runtime.spec import Tower
from tests.profiles.predict.known_device import known_device

DEVICE = known_device()


@pytest.fixture(scope="module")
def built_in() -> TeacherSizes:
    return TeacherSizes.read(BUILT_IN_TEACHER)


@pytest.fixture(scope="module")
def plan(built_in: TeacherSizes) -> StudentPlan:
    return plan_student(built_in, DEVICE, latency_ms=1.0, precision="int8")


def test_sizes_are_read_from_the_configuration_alone(teacher: DualEncoder, tmp_path: Path) -> None:
    teacher.model.config.save_pretrained(tmp_path)
    sizes = TeacherSizes.read(tmp_path)
    assert sizes.image == TransformerTower(
        part="image", width=64, heads=2, hidden=256, layers=4, tokens=17, dim=32, patch=8
    )
    assert sizes.text is not None
    assert (sizes.text.layers, sizes.text.tokens) == (2, 40)
    assert sizes.image_size == 32


@pytest.mark.parametrize("part", ["image", "text"])
def test_parameters_are_those_of_the_students(teacher: DualEncoder, part: Tower) -> None:
    sizes = _sizes(teacher)
    whole = sizes.tower(part)
    assert whole is not None
    assert sizes.parameters(whole) == _weights(teacher, part)
    assert sizes.whole[part == "text"] == _weights(teacher, part)
    for shape, tower in list(candidates(sizes, part))[::3]:
        assert sizes.parameters(tower) == _weights(new_student(teacher, shape), part)


@pytest.mark.parametrize("family", ["convolutional", "convnextv2"])
def test_parameters_of_a_convolutional_student(
    teacher: DualEncoder, family: ImageFamilyName
) -> None:
    shape = StudentShape(family=family, conv_widths=(8, 16, 24), conv_depths=(1, 2, 1))
    tower = ConvTower(
        widths=(8, 16, 24), depths=(1, 2, 1), image_size=32, dim=32, grn=family == "convnextv2"
    )
    assert _sizes(teacher).parameters(tower) == _weights(new_student(teacher, shape), "image")


def test_the_largest_that_keeps_the_budget_is_chosen(plan: StudentPlan) -> None:
    assert plan.best.prediction.high <= 1.0
    larger = [item for item in plan.students if item.parameters > plan.best.parameters]
    assert larger
    assert all(item.prediction.high > 1.0 for item in larger)
    assert 0 < plan.best.share < 1
    families = {item.shape.family for item in plan.students}
    assert families == {"inherited", "convolutional", "convnextv2"}
    whole = [item for item in plan.students if item.share == 1]
    assert [(item.shape.image_heads, item.shape.image_layers) for item in whole] == [(4, 8)]


def test_more_time_allows_more(built_in: TeacherSizes, plan: StudentPlan) -> None:
    found = [plan_student(built_in, DEVICE, latency_ms=ms).best for ms in (0.5, 1.0, 50.0)]
    assert [item.parameters for item in found] == sorted(item.parameters for item in found)
    assert found[-1].share == 1


def test_nothing_fits(built_in: TeacherSizes) -> None:
    with pytest.raises(InputError, match=r"no student surely keeps 0\.01 ms in fp32 on known: the"):
        plan_student(built_in, DEVICE, latency_ms=0.01)
    with pytest.raises(InputError, match=r"can be predicted: 'known' has no times of .* in fp16"):
        plan_student(built_in, DEVICE, latency_ms=1, precision="fp16")


def test_without_a_whole_tower_no_student_surely_keeps_a_budget(built_in: TeacherSizes) -> None:
    bare = dataclasses.replace(DEVICE, checks=())
    with pytest.raises(InputError, match="no whole tower was measured there in fp32, so that no"):
        plan_student(built_in, bare, latency_ms=1000)


def test_a_text_takes_as_long_as_it_is_long(built_in: TeacherSizes) -> None:
    towers = [
        plan_student(built_in, DEVICE, latency_ms=0.8, part="text", text_tokens=tokens).best
        for tokens in (8, None)
    ]
    assert towers[0].parameters > towers[1].parameters
    with pytest.raises(InputError, match="has 2 to 40 tokens"):
        plan_student(built_in, DEVICE, latency_ms=1, part="text", text_tokens=41)


def test_what_is_shown_is_what_is_near_the_budget(plan: StudentPlan) -> None:
    shown = worth_showing(plan)
    assert plan.best in shown
    assert len(shown) < len(plan.students)
    assert {item.keeps for item in shown} == {True, False}


def test_distill_understands_the_options(plan: StudentPlan) -> None:
    parser = argparse.ArgumentParser()
    distill_command.add_arguments(parser)
    for item in plan.students:
        words = distill_options(item, "image")
        args = parser.parse_args([*words, "--out", "student"])
        shape = distill_command.recipe_of(args).student
        assert shape.family == item.shape.family
        if shape.family == "inherited":
            assert shape.image_heads == item.shape.image_heads
            assert shape.image_layers == item.shape.image_layers
        else:
            usual = IMAGE_FAMILIES[shape.family]
            assert (shape.conv_widths or usual.widths) == item.shape.conv_widths
            assert (shape.conv_depths or usual.depths) == item.shape.conv_depths


def test_families_that_no_probe_measures_are_named_with_their_sizes(
    plan: StudentPlan, built_in: TeacherSizes
) -> None:
    teacher = DualEncoder.load(BUILT_IN_TEACHER)
    smallest = {item.shape.family: item for item in plan.unpredicted}  # the largest come first
    assert smallest.keys() == IMAGE_FAMILIES.keys() - {"convolutional", "convnextv2"}
    assert plan.too_small == ()
    parser = argparse.ArgumentParser()
    distill_command.add_arguments(parser)
    for item in smallest.values():
        assert item.share == item.parameters / built_in.whole[0] <= 1
        words = distill_options(item, "image")
        args = parser.parse_args([*words, "--whole-text", "--out", "student"])
        student = new_student(teacher, distill_command.recipe_of(args).student)
        assert _weights(student, "image") == item.parameters


def test_blocks_that_a_device_has_no_times_of_are_not_predicted(built_in: TeacherSizes) -> None:
    costs = tuple(cost for cost in DEVICE.costs if cost.piece.kind != "grn-block")
    checks = tuple(check for check in DEVICE.checks if "grn" not in check.name)
    older = dataclasses.replace(DEVICE, costs=costs, checks=checks)
    found = plan_student(built_in, older, latency_ms=50)
    assert "convnextv2" not in {item.shape.family for item in found.students}
    assert "convnextv2" in {item.shape.family for item in found.unpredicted}
    assert found.unknown == 0


def test_families_that_need_larger_pictures_are_named(teacher: DualEncoder) -> None:
    found = plan_student(_sizes(teacher), DEVICE, latency_ms=50)
    assert found.too_small == ("levit",)
    assert "levit" not in {item.shape.family for item in found.unpredicted}


def test_of_other_teachers_what_can_be_predicted_is(tmp_path: Path) -> None:
    SiglipConfig(
        vision_config={"hidden_size": 128, "num_attention_heads": 2, "image_size": 64},
        text_config={"hidden_size": 128, "num_attention_heads": 2, "vocab_size": 500},
    ).save_pretrained(tmp_path)
    sizes = TeacherSizes.read(tmp_path)
    model = SiglipModel(AutoConfig.from_pretrained(tmp_path))
    counts = (sum(own.numel() for own in part.parameters()) for part in model.children())
    text, image = counts
    assert sizes.whole == (image, text)
    assert (sizes.dim, sizes.image, sizes.text) == (128, None, None)
    found = plan_student(sizes, DEVICE, latency_ms=50)
    assert {item.shape.family for item in found.students} == {"convolutional", "convnextv2"}
    with pytest.raises(InputError, match="the text tower of a siglip cannot be planned"):
        plan_student(sizes, DEVICE, latency_ms=50, part="text")


def test_verb_prints_students_and_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DEVICE.save(tmp_path / "known.json")
    words = ["--device", str(tmp_path / "known.json"), "--latency-ms", "1", "--precision", "int8"]
    assert _run(*words) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n* ") == 2  # the student, and what the star means
    command = shlex.split(printed.strip().splitlines()[-1])
    assert command[:2] == ["edgeclip", "distill"]
    parser = argparse.ArgumentParser()
    distill_command.add_arguments(parser)
    assert distill_command.recipe_of(parser.parse_args(command[2:])).teacher == ("built-in",)
    assert _run(*words, "--all") == 0
    assert len(capsys.readouterr().out) > len(printed)
    with pytest.raises(InputError, match="--latency-ms must be above 0"):
        _run(*words, "--latency-ms", "-1")


def test_other_teachers_are_refused(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is a bert: only students of clip"):
        TeacherSizes.read(tmp_path)
    with pytest.raises(ConfigError, match="cannot read the configuration of the teacher"):
        TeacherSizes.read(tmp_path / "nowhere")


def test_a_large_teacher_has_students_that_cannot_be_told(tmp_path: Path) -> None:
    vision = {"hidden_size": 2048, "num_attention_heads": 32, "num_hidden_layers": 2}
    CLIPConfig(vision_config={**vision, "intermediate_size": 8192}).save_pretrained(tmp_path)
    found = plan_student(TeacherSizes.read(tmp_path), DEVICE, latency_ms=50)
    assert found.unknown == 2 * 8  # beyond three times the widest that was measured


def _sizes(teacher: DualEncoder) -> TeacherSizes:
    with tempfile.TemporaryDirectory() as folder:
        teacher.model.config.save_pretrained(folder)
        return TeacherSizes.read(folder)


def _weights(dual: DualEncoder, part: Tower) -> int:
    names = {"image": ("vision_model.", "visual_projection."), "text": ("text_model.", "text_pro")}
    return sum(
        value.numel()
        for name, value in dual.model.named_parameters()
        if name.startswith(names[part])
    )


def _run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    plan_student_command.add_arguments(parser)
    return plan_student_command.run(parser.parse_args(words))
