"""The words of scripts/cache_trial.py."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from data.synthetic import Backgrounds

Model = Literal["dit", "lingen"]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
SKIPS: dict[str, tuple[float, ...]] = {"core": (0.3, 0.5, 0.65, 0.8), "all": (0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.8)}
CALIBRATION_SEED, GATE_SEED = 1_000_000, 2_000_000  # where the seeds begin that nothing is judged on


class TrialWords(BaseModel):
    """What is trained, what is sampled, and how much of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    out: str = "runs/cache_trial"
    experiment: str = "cache_trial"  # of the trainings
    overrides: str = ""  # more words for them and for the latents, as one text: overrides="seed=1 model.mate=..."
    clips: PositiveInt = 16000  # of the rendered world that is trained on
    images: PositiveInt = 8000
    backgrounds: Backgrounds = ["plain", "gradient"]  # in it; textured ones take a small model long to learn
    models: Annotated[list[Model], Field(min_length=1)] = ["dit", "lingen"]
    checkpoints: dict[Model, str] = {}  # trained ones that are there; the models without one are trained
    autoencoder: str | None = None  # of those, where it is no longer where they were trained

    variants: Literal["core", "all"] = "core"
    skips: list[Share] | None = None  # the shares of FLOPs that caches are fitted to skip; None: those of ``variants``
    seeds: Annotated[int, Field(ge=2)] = 256  # each a caption and a noise of its own, from ``seed`` on
    seed: NonNegativeInt = 0
    steps: Annotated[int, Field(ge=6)] = 30
    reference_steps: PositiveInt = 60
    batch: PositiveInt = 32
    frames: PositiveInt | None = None
    height: PositiveInt | None = None
    width: PositiveInt | None = None
    truncate: bool = False  # let the text encoders cut captions that are longer than they take
    calibration_seeds: PositiveInt = 16
    rounds: PositiveInt = 8  # trials of a calibration
    gate_seeds: Annotated[int, Field(ge=2)] = 512  # whose attributes are looked at before anything is sampled
    need_trained: bool = True  # stop where the check is not clearly above chance
    threshold_db: PositiveFloat = 27.0  # of PSNR to the uncached videos: PAB-slow's published one
    shown: Annotated[int, Field(ge=0, le=50)] = 4  # videos on the page, of each run

    dry_run: bool = False  # say what it would take, and stop
    docs: str | None = None  # a markdown file that the report is put into, between its two marks

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.reference_steps <= self.steps:
            raise ValueError(f"reference_steps={self.reference_steps}: a reference takes more than steps={self.steps}")
        if len(set(self.models)) < len(self.models):
            raise ValueError("models: each once")
        if idle := sorted(set(self.checkpoints) - set(self.models)):
            raise ValueError(f"checkpoints: {idle[0]} is none of models=[{','.join(self.models)}]")
        if self.seed + self.seeds > CALIBRATION_SEED:
            raise ValueError(f"seeds end below {CALIBRATION_SEED}, where those of the calibrations begin")
        return self

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the FLOPs, to be skipped, ascending."""
        return tuple(sorted(set(self.skips or SKIPS[self.variants])))
