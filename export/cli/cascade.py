"""`edgeclip cascade`: certify when a student's answers should be escalated to its teacher."""

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path

from edgeclip.compress.cli.options import (
    add_pairs_option,
    log_step,
    max_bad,
)
from edgeclip.export.bundle.add_to_bundle import add_to_bundle
from edgeclip.export.cascade.cascade_eval_set import (
    CascadeEvalSet,
    retrieval_eval_set,
    zero_shot_eval_set,
)
from edgeclip.export.cascade.cascade_evaluator import measure_costs
from edgeclip.export.cascade.cascade_report import (
    CascadeReport,
    Costs,
    CurvePoint,
    curve,
    curve_table,
    write_cascade_page,
)
from edgeclip.export.cascade.certify import CascadePlan, CertificationResult, certify
from edgeclip.export.cascade.ledger import default_ledger_path
from edgeclip.export.cli.options import add_cluster_option, cluster_by
from edgeclip.profiles.workload import load_workload, workload_names
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import json_fields
from edgeclip.runtime.bundle.index import LabelSet
from edgeclip.runtime.cascade.certificate import (
    Certificate,
    CertifiedLabels,
    certified_labels_path,
)
from edgeclip.runtime.cascade.scores import Agreement, Entropy, Margin, Score
from edgeclip.runtime.cli.options import (
    Targets,
    add_device_option,
    add_json_option,
    positive,
    print_json,
)
from edgeclip.runtime.device.link import link_names, load_link
from edgeclip.runtime.device.machine import detect_machine
from edgeclip.runtime.encoder import DEFAULT_TEMPLATES, Encoder
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.find_images import add_max_bad_option
from edgeclip.runtime.spec import EncoderSpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("bundle", type=Path, help="the student's bundle, which gets a certificate")
    parser.add_argument("--teacher", type=Path, required=True, help="the teacher's bundle")
    add_pairs_option(parser)
    parser.add_argument(
        "--share",
        type=float,
        default=0.95,
        help="share of the teacher's quality to keep (default: 0.95)",
    )
    parser.add_argument(
        "--delta",
        type=float,
        default=0.05,
        help="accepted chance of a wrong certificate (default: 0.05)",
    )
    _add_eval_set_options(parser)
    parser.add_argument(
        "--score",
        choices=("margin", "entropy", "agreement"),
        default="margin",
        help="confidence score of the student: margin of the best over the second cosine, entropy "
        "over all entries, or agreement of augmented views (default: margin)",
    )
    parser.add_argument(
        "--views",
        type=positive,
        default=4,
        help="number of views of --score agreement (default: 4)",
    )
    parser.add_argument(
        "--workload",
        default="quick",
        help=f"how long to measure: a YAML file, or {', '.join(workload_names())} (default: quick)",
    )
    parser.add_argument(
        "--link",
        help=f"add the network of this profile to the costs: a YAML file, or "
        f"{', '.join(link_names())}",
    )
    add_device_option(parser)
    parser.add_argument("--page", type=Path, help="write the curve to this HTML file")
    parser.add_argument(
        "--dry-run", action="store_true", help="do not write the certificate into the bundle"
    )
    add_json_option(parser)


def _add_eval_set_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--query",
        choices=("image", "text"),
        default="image",
        help="the side of a pair that is the query (default: image)",
    )
    parser.add_argument(
        "--labels",
        action="store_true",
        help="classify instead of retrieve, with one subfolder of pictures for each class",
    )
    add_max_bad_option(parser)
    parser.add_argument(
        "--template",
        action="append",
        help=f"sentence around a class name; may be repeated (default: {DEFAULT_TEMPLATES[0]!r})",
    )
    parser.add_argument(
        "--index-by",
        choices=("teacher", "student"),
        default="teacher",
        help="whose bundle embeds the entries that queries choose from (default: teacher)",
    )
    add_cluster_option(parser)
    parser.add_argument(
        "--ledger",
        type=Path,
        help="file that keeps which students, scores and shares were tried on these queries: each "
        "further try has a smaller part of --delta, and more queries continue a try where "
        "calibration, gallery and clusters stay (default: one for emoji and one for all other "
        "data, in ~/.local/state/edgeclip or $EDGECLIP_STATE)",
    )
    counts = (("test", 2000), ("calibration", 1000), ("gallery", 1000))
    for name, count in counts:
        parser.add_argument(
            f"--{name}-count",
            type=positive,
            default=count,
            help=f"number of {name} pairs, with --data emoji (default: {count})",
        )


def targets(args: argparse.Namespace) -> Targets:
    """Return what the command writes."""
    written = None if args.dry_run or not args.bundle.is_dir() else args.bundle
    return Targets(folders=(written,), files=(args.page, args.ledger))


def run(args: argparse.Namespace) -> int:
    """Certify, measure, print the curve; 1 if nothing can be certified."""
    student = Encoder.open(args.bundle, device=args.device)
    teacher = Encoder.open(args.teacher, device=args.device)
    plan = CascadePlan(
        student=student,
        teacher=teacher,
        eval_set=_eval_set(args, student.spec),
        score=_score(args, student.spec),
        bound=args.share,
        delta=args.delta,
        index_by=args.index_by,
        cluster_by=cluster_by(args),
        ledger=args.ledger or default_ledger_path(args.data),
        command=args.command,
    )
    link = None if args.link is None else load_link(args.link)
    workload = load_workload(args.workload)
    evaluator = plan.evaluator()
    found = certify(plan, evaluator)
    log_step("measuring student and teacher")
    costs, _ = measure_costs(
        student,
        teacher,
        plan.eval_set.test,
        evaluator.entries,
        query=plan.eval_set.query,
        score=plan.score,
        workload=workload,
        link=link,
    )
    points = curve(found.outcomes, found.grid, certified=found.count, costs=costs)
    _show(args, plan, found, points, costs)
    if found.certificate is not None and not args.dry_run:
        written = add_certificate(student.bundle, found.certificate, evaluator.labels)
        log_step(f"certificate written to {written.path / found.certificate.path}")
    return 1 if found.certificate is None else 0


def add_certificate(
    bundle: Bundle, certificate: Certificate, labels: CertifiedLabels | None
) -> Bundle:
    """Write a certificate into a bundle, its label sets first, and open the bundle again.

    Raises:
        ExportError, InputError, BundleError: see `add_to_bundle`.
    """
    if labels is not None:
        found = {"teacher": labels.teacher, certificate.tested_on.index_by: labels.entries}
        for by, label_set in found.items():
            bundle = add_to_bundle(bundle, certified_labels_path(by), _npz(label_set))
    return add_to_bundle(bundle, certificate.path, certificate.to_json().encode())


def _npz(labels: LabelSet) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labels.npz"
        labels.save(path)
        return path.read_bytes()


def verdict(plan: CascadePlan, result: CertificationResult) -> str:
    """Return one sentence: the certificate's promise, or why nothing is certified."""
    if result.certificate is not None:
        return result.certificate.promise
    return (
        f"Nothing is certified: with {len(result.outcomes):,} queries, no threshold is sure enough "
        f"to keep {100 * plan.bound:.3g}% of the teacher's quality. Give more test pairs, or ask "
        "for a smaller --share, which is another try. More pairs continue this one only where "
        "calibration, gallery and the clusters of the old pairs stay: with a larger --test-count "
        "of emoji, or pictures added to the subfolder test/ alone"
    )


def turn_words(plan: CascadePlan, result: CertificationResult) -> str:
    """Say which part of delta this try had, and why."""
    return f"{result.turn.words}: {result.tested_at:.3g} of {plan.delta:g}"


def _show(
    args: argparse.Namespace,
    plan: CascadePlan,
    found: CertificationResult,
    points: tuple[CurvePoint, ...],
    costs: Costs,
) -> None:
    """Print the curve, and write its HTML page if asked to."""
    words = verdict(plan, found)
    names = (plan.student.bundle.manifest.name, plan.teacher.bundle.manifest.name)
    if args.page is not None:
        page = CascadeReport(
            title=f"{names[0]} first, {names[1]} for the unsure",
            verdict=words,
            bound=plan.bound,
            points=points,
            costs=costs,
            certificate=found.certificate,
            machine=detect_machine().cpu,
        )
        write_cascade_page(page, args.page)
    if args.json:
        certificate = None
        if found.certificate is not None:
            certificate = asdict(found.certificate, dict_factory=json_fields)
        curve_json = [asdict(point, dict_factory=json_fields) for point in points]
        tried = {"number": found.turn.number, "delta": found.tested_at, "why": found.turn.words}
        print_json(
            {
                "certificate": certificate,
                "try": tried,
                "costs": asdict(costs),
                "curve": curve_json,
            }
        )
        return
    print(curve_table(points, costs))
    print(f"student with its score {costs.student_ms:.2f} ms, teacher {costs.teacher_ms:.2f} ms")
    print(turn_words(plan, found))
    print(words)


def _eval_set(args: argparse.Namespace, spec: EncoderSpec) -> CascadeEvalSet:
    size = spec.image.size
    if args.labels and args.query == "text":
        raise InputError("only pictures are classified: leave out --labels or --query text")
    if args.labels:
        templates = args.template or DEFAULT_TEMPLATES
        return zero_shot_eval_set(
            args.data, templates, size=size, strict=args.strict, max_bad=max_bad(args)
        )
    return retrieval_eval_set(
        args.data,
        args.query,
        calibration=args.calibration_count,
        test=args.test_count,
        gallery=args.gallery_count,
        size=size,
        strict=args.strict,
        max_bad=max_bad(args),
    )


def _score(args: argparse.Namespace, spec: EncoderSpec) -> Score:
    if args.score == "margin":
        return Margin()
    if args.score == "entropy":
        return Entropy(logit_scale=spec.logit_scale)
    return Agreement(views=args.views)
