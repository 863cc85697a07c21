"""A network of time series that others have trained: CSDI (arXiv 2107.03502), which fills in what was not measured, as a pipeline.

    python examples/benchmarks/time_series.py

A series is 35 measurements of a patient in intensive care over 48 hours. `NUM_KNOWN` of its values are known, the other entries are
sampled, and more measured values among these say how good they are. A solver is distilled for each number of evaluations, and a plan
of SDM calibrated to the same teacher. Every deterministic scheduler of Diffusers is tried with each of its spacing options. The
best of them and ours are measured on patients whom neither the network nor a fit has seen: the mean squared and the mean absolute
distance to the teacher's samples of 50 steps, in standard deviations of each measurement, and the continuous ranked probability
score of the values that were measured but not known. Solvers, plans and the teacher's samples are kept, so that an interrupted run
goes on. It takes about half an hour on a CPU core.
The results are time_series.json, .md and .png beside this file, or in the folder DIFFUSERS_GAS_BENCHMARK_OUTPUT.

The weights (MIT licence) and the patients' records (PhysioNet Challenge 2012, ODC-BY) are downloaded when they are first needed.
"""

import csv
import hashlib
import math
import urllib.request
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, DDPMScheduler, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from of_others import FIRST_SEED, TEACHER_STEPS, Row, Subject, row_labels, table
from report import figure, measure_each, output_folder, write
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from diffusers_gas import SampleInputs
from diffusers_gas.pipelines.teacher import default_teacher
from diffusers_gas.utils.files import replacing


NAME = "intensive care"

GITHUB = "https://raw.githubusercontent.com"
WEIGHTS = f"{GITHUB}/ermongroup/CSDI/7f24a436f08d98853a6b43d4f7f04e5a65ecdf27/save/pretrained/model.pth"
WEIGHTS_SHA256 = "9acb4ee828a0c271466814c703d00c666caecb826fc5e9c2438ae39bd8d72771"

# Patients of the challenge's set c, of which the network has seen none: those with at least 300 measured values.
RECORDS = f"{GITHUB}/SamuelJoray/Predicting-Mortality-of-ICU-Patients/7d004326132fddd268f645bf0b37217fd15bcedb/set-c/{{}}.txt"
RECORDS_SHA256 = "a4c2737389d2b5885ad4cc525ea8bbd6739094252849e4c5f63383df4bada2fa"
PATIENTS = (
    *(152871, 152873, 152878, 152882, 152884, 152885, 152886, 152887, 152890, 152897, 152898, 152901, 152907, 152910),
    *(152912, 152913, 152914, 152916, 152918, 152925, 152927, 152931, 152934, 152935, 152947, 152955, 152956, 152957),
    *(152963, 152971, 152973, 152982, 152989, 152999, 153000, 153004, 153007, 153008, 153013, 153015, 153019, 153027),
    *(153028, 153029, 153030, 153031, 153033, 153034),
)
# The first patients are for the fits.
NUM_FITTED = 16
NUM_HOURS, NUM_KNOWN = 48, 240

# Mean and standard deviation of the measurements, in the order of the network, of the challenge's set a, which it was trained on.
MEASUREMENTS = {
    "DiasABP": (59.54, 13.01),
    "HR": (86.72, 17.79),
    "Na": (139.1, 5.186),
    "Lactate": (2.88, 2.529),
    "NIDiasABP": (58.14, 15.06),
    "PaO2": (147.5, 85.96),
    "WBC": (12.67, 7.649),
    "pH": (7.491, 8.385),
    "Albumin": (2.923, 0.6515),
    "ALT": (394.9, 1201),
    "Glucose": (141.5, 67.62),
    "SaO2": (96.66, 3.294),
    "Temp": (37.07, 1.56),
    "AST": (505.6, 1515),
    "Bilirubin": (2.906, 5.902),
    "HCO3": (23.12, 4.708),
    "BUN": (27.41, 23.4),
    "RespRate": (19.65, 5.509),
    "Mg": (2.028, 0.422),
    "HCT": (30.69, 5.002),
    "SysABP": (119.6, 23.73),
    "FiO2": (0.5405, 0.1863),
    "K": (4.136, 0.7063),
    "GCS": (11.41, 3.968),
    "Cholesterol": (156.5, 45.99),
    "NISysABP": (119.2, 21.98),
    "TroponinT": (1.2, 2.717),
    "MAP": (80.2, 16.23),
    "TroponinI": (7.127, 9.754),
    "PaCO2": (40.4, 9.062),
    "Platelets": (191.1, 106.5),
    "Urine": (116.1, 170.7),
    "NIMAP": (77.09, 14.86),
    "Creatinine": (1.505, 1.637),
    "ALP": (116.8, 134),
}

STEPS = (4,)
# Two noises for each patient.
NUM_NOISES, NUM_SCREENED, BATCH_SIZE = 2, 6, 8
DISTILLATION_SAMPLES, MOST_EVALUATIONS = 40, 5000
CALIBRATION_SAMPLES, MOST_CALIBRATION_EVALUATIONS = 10, 2000

# The patient of the picture, among those that are judged, with the noises, the measurements and the number of evaluations there.
PICTURED_PATIENT, NUM_PICTURED, PICTURED_STEPS = 0, 16, 4
PICTURED = {"HR": "heart rate\nin 1 / minute", "SysABP": "systolic pressure\nin mmHg", "Temp": "temperature\nin °C"}


class Layer(nn.Module):
    """A residual layer that attends to the other hours and then to the other measurements."""

    def __init__(self, channels: int, side_channels: int, time_channels: int, num_heads: int):
        super().__init__()
        self.diffusion_projection = nn.Linear(time_channels, channels)
        self.cond_projection = nn.Conv1d(side_channels, 2 * channels, 1)
        self.mid_projection = nn.Conv1d(channels, 2 * channels, 1)
        self.output_projection = nn.Conv1d(channels, 2 * channels, 1)
        self.time_layer, self.feature_layer = (
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(channels, num_heads, channels, activation="gelu", batch_first=True), 1
            )
            for _ in range(2)
        )

    def forward(self, states: Tensor, time: Tensor, side: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """From `(batch, measurements, hours, channels)` to the next states and what the output takes of this layer."""
        x = states + self.diffusion_projection(time)[:, None, None]
        x = self.time_layer(x.flatten(0, 1)).view_as(x).transpose(1, 2)
        x = self.feature_layer(x.flatten(0, 1)).view_as(x).transpose(1, 2)
        # The last channel beside the series differs between patients.
        weight = self.cond_projection.weight.squeeze(-1)
        beside = linear(side, weight[:, :-1], self.cond_projection.bias) + known * weight[:, -1]
        gate, signal = (pointwise(self.mid_projection, x) + beside).chunk(2, dim=-1)
        residual, skipped = pointwise(self.output_projection, gate.sigmoid() * signal.tanh()).chunk(2, dim=-1)
        return (states + residual) / math.sqrt(2), skipped


class TimeEmbedding(nn.Module):
    """The embedding of whole times. Between two of them it is interpolated: the sines turn more than once from one to the next."""

    def __init__(self, channels: int):
        super().__init__()
        self.projection1, self.projection2 = nn.Linear(channels, channels), nn.Linear(channels, channels)

    def forward(self, timestep: Tensor) -> Tensor:
        whole = timestep.floor()
        return torch.lerp(self.of_whole(whole), self.of_whole(whole + 1), (timestep - whole).unsqueeze(-1))

    def of_whole(self, timestep: Tensor) -> Tensor:
        half = self.projection1.in_features // 2
        # Rounded as in training: late times have turned so often that the last digit matters.
        frequencies = 10 ** (torch.arange(half).to(timestep) / (half - 1) * 4)
        angles = timestep.unsqueeze(-1) * frequencies
        return silu(self.projection2(silu(self.projection1(torch.cat([angles.sin(), angles.cos()], dim=-1)))))


class ImputationNetwork(ModelMixin, ConfigMixin):
    """Predicts the noise of the entries of a series that are not known.

    The heads are the paper's, and the other sizes those of the weights.
    """

    @register_to_config
    def __init__(
        self,
        num_measurements: int,
        feature_channels: int,
        channels: int,
        time_channels: int,
        num_layers: int,
        num_heads: int = 8,
    ):
        super().__init__()
        self.embed_layer = nn.Embedding(num_measurements, feature_channels)
        self.diffusion_embedding = TimeEmbedding(time_channels)
        self.input_projection = nn.Conv1d(2, channels, 1)
        self.output_projection1 = nn.Conv1d(channels, channels, 1)
        self.output_projection2 = nn.Conv1d(channels, 1, 1)
        side_channels = time_channels + feature_channels + 1
        self.residual_layers = nn.ModuleList(
            Layer(channels, side_channels, time_channels, num_heads) for _ in range(num_layers)
        )

    def forward(self, sample: Tensor, timestep: Tensor, series: Tensor) -> Tensor:
        """
        Args:
            sample (`Tensor` of shape `(batch, unknown)`): The states of the unknown entries, measurement by measurement.
            timestep: The time, which need not be whole.
            series (`Tensor` of shape `(batch, measurements, hours)`): What is known, and NaN elsewhere. All have as many unknown entries.
        """
        unknown = series.isnan()
        states = torch.stack([series.nan_to_num(), torch.zeros_like(series).masked_scatter(unknown, sample)], dim=-1)
        x = pointwise(self.input_projection, states).relu()
        time = self.diffusion_embedding(torch.as_tensor(timestep).to(sample).expand(len(sample)))
        side, known, output = self.beside(series.shape[-1]), (~unknown).to(x).unsqueeze(-1), torch.zeros_like(x)
        for layer in self.residual_layers:
            x, skipped = layer(x, time, side, known)
            output = output + skipped
        output = pointwise(self.output_projection1, output / math.sqrt(len(self.residual_layers))).relu()
        return pointwise(self.output_projection2, output).squeeze(-1)[unknown].view_as(sample)

    def beside(self, num_hours: int) -> Tensor:
        """What the network is told of every entry: its hour and its measurement. `(measurements, hours, channels)`"""
        features, half = self.embed_layer.weight, self.config.time_channels // 2
        frequencies = 10_000 ** (-torch.arange(half).to(features) / half)
        angles = torch.arange(num_hours).to(features).unsqueeze(-1) * frequencies
        hours = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
        shape = len(features), num_hours, -1
        return torch.cat([hours.expand(*shape), features.unsqueeze(1).expand(*shape)], dim=-1)


def pointwise(convolution: nn.Conv1d, x: Tensor) -> Tensor:
    """A convolution of width 1 over the last axis."""
    return linear(x, convolution.weight.squeeze(-1), convolution.bias)


class ImputationPipeline(DiffusionPipeline):
    """Fills in a series. The states of its scheduler are those of the unknown entries."""

    def __init__(self, network: ImputationNetwork, scheduler: Any):
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, series: Tensor, num_inference_steps: int = TEACHER_STEPS, generator: Any = None) -> Tensor:
        unknown = series.isnan()
        shape = (len(series), int(unknown.sum()) // len(series))
        self.scheduler.set_timesteps(num_inference_steps, device=series.device)
        sample = randn_tensor(shape, generator, series.device, series.dtype) * self.scheduler.init_noise_sigma
        for timestep in self.progress_bar(self.scheduler.timesteps):
            noise = self.network(self.scheduler.scale_model_input(sample, timestep), timestep, series)
            sample = self.scheduler.step(noise, timestep, sample, return_dict=False)[0]
        return series.masked_scatter(unknown, sample)


def download(name: str, urls: list[str], sha256: str) -> Path:
    """A file of the output folder: the contents of all URLs one after another, with the expected hash."""
    path = output_folder() / ".time_series" / name
    if not path.exists():
        content = b""
        for url in urls:
            with urllib.request.urlopen(url) as response:
                content += response.read()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise OSError(f"{urls[0]} is not what it was when this benchmark was written: its hash differs.")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(content)
    return path


def load_pipeline() -> ImputationPipeline:
    weights = torch.load(download("model.pth", [WEIGHTS], WEIGHTS_SHA256), weights_only=True, map_location="cpu")
    weights = {name.removeprefix("diffmodel."): value for name, value in weights.items()}
    channels, time_channels = weights["residual_layers.0.diffusion_projection.weight"].shape
    num_layers = len({name.split(".")[1] for name in weights if name.startswith("residual_layers.")})
    network = ImputationNetwork(*weights["embed_layer.weight"].shape, channels, time_channels, num_layers)
    network.load_state_dict(weights)
    betas = {"beta_start": 1e-4, "beta_end": 0.5, "beta_schedule": "scaled_linear"}
    scheduler = DDPMScheduler(num_train_timesteps=50, **betas, clip_sample=False)
    return ImputationPipeline(network.requires_grad_(False).eval(), scheduler)


def load_patients() -> tuple[Tensor, Tensor]:
    """What is known and what was measured of each patient, `(patients, measurements, hours)` with NaN elsewhere.

    The values are relative to mean and standard deviation of the measurement. An hour has the last of its values.
    """
    path = download("records.csv", [RECORDS.format(patient) for patient in PATIENTS], RECORDS_SHA256)
    measured = torch.full((len(PATIENTS), len(MEASUREMENTS), NUM_HOURS), math.nan)
    names, patient = list(MEASUREMENTS), -1
    for time, name, value in csv.reader(path.read_text().splitlines()):
        hour = time.split(":")[0]
        if name == "Parameter":  # the head of the next record
            patient += 1
        elif name in MEASUREMENTS and int(hour) < NUM_HOURS:
            mean, deviation = MEASUREMENTS[name]
            measured[patient, names.index(name), int(hour)] = (float(value) - mean) / deviation
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(measured.shape, generator=generator).masked_fill(measured.isnan(), 2).flatten(1).argsort(1)
    known = torch.full_like(measured, math.nan).flatten(1)
    chosen = order[:, :NUM_KNOWN]
    return known.scatter(1, chosen, measured.flatten(1).gather(1, chosen)).view_as(measured), measured


def inputs_of(series: Tensor, first_seed: int, num_samples: int) -> SampleInputs:
    """Samples of the given patients in turn."""
    return SampleInputs.create(first_seed, num_samples, [{"series": one} for one in series.split(1)])


def subject() -> Subject:
    known, _ = load_patients()
    fitted, judged = known[:NUM_FITTED], known[NUM_FITTED:]
    return Subject(
        NAME,
        load_pipeline(),
        output_folder() / ".time_series",
        STEPS,
        inputs_of(judged, FIRST_SEED, NUM_NOISES * len(judged)),
        NUM_SCREENED,
        BATCH_SIZE,
        {
            "inputs": inputs_of(fitted, 0, DISTILLATION_SAMPLES),
            "batch_size": BATCH_SIZE,
            "max_evaluations": MOST_EVALUATIONS,
        },
        {
            "inputs": inputs_of(fitted, 0, CALIBRATION_SAMPLES),
            "batch_size": BATCH_SIZE,
            "most_evaluations": MOST_CALIBRATION_EVALUATIONS,
        },
    )


def scores(states: Tensor, teacher: Tensor) -> dict[str, float]:
    """The continuous ranked probability score of the values that were measured but not known, and that of the teacher's samples.

    It is the mean distance of a sample to the value less half of that between two samples (Gneiting and Raftery, 2007, equation 21).
    """
    known, measured = (patients[NUM_FITTED:] for patients in load_patients())
    values = measured[known.isnan()].view(len(known), -1)
    is_measured = ~values.isnan()

    def score(samples: Tensor) -> float:
        first, second = samples.unflatten(0, (NUM_NOISES, -1))
        apart = ((first - values).abs() + (second - values).abs() - (first - second).abs()) / 2
        return apart[is_measured].mean().item()

    return {"score": score(states), "teacher_score": score(teacher)}


def measure(name: str) -> list[Row]:
    return subject().measure(scores)


def draw(rows: list[Row]) -> Any:
    """A patient's course as the teacher, the best of Diffusers, SDM and GS fill it in: the median and nine tenths of the samples."""
    shown = subject()
    known, measured = (patients[NUM_FITTED + PICTURED_PATIENT] for patients in load_patients())
    samplers = shown.pictured(rows, PICTURED_STEPS)
    inputs = inputs_of(known.unsqueeze(0), 2 * FIRST_SEED, NUM_PICTURED)
    columns = [(default_teacher(shown.pipe), TEACHER_STEPS), *((x, PICTURED_STEPS) for x in samplers.values())]
    page, axes = figure(len(PICTURED), len(columns), (11, 6), sharex=True, sharey="row")
    for i, ((scheduler, n), label) in enumerate(zip(columns, row_labels(samplers, PICTURED_STEPS))):
        states = shown.samples(scheduler, n, inputs)
        courses = known.expand(NUM_PICTURED, -1, -1).masked_scatter(known.isnan(), states)
        axes[0][i].set_title(label, fontsize=10)
        axes[-1][i].set_xlabel("hour")
        for axis, (name, title) in zip(axes[:, i], PICTURED.items()):
            position, (mean, deviation) = list(MEASUREMENTS).index(name), MEASUREMENTS[name]
            low, middle, high = (
                courses[:, position].quantile(torch.tensor([0.05, 0.5, 0.95]), dim=0) * deviation + mean
            )
            axis.fill_between(range(NUM_HOURS), low, high, color="tab:blue", alpha=0.25, linewidth=0)
            axis.plot(middle, color="tab:blue", linewidth=1.2)
            axis.plot(measured[position] * deviation + mean, "o", color="tab:red", fillstyle="none", markersize=4)
            axis.plot(known[position] * deviation + mean, "o", color="black", markersize=4)
            if i == 0:
                axis.set_ylabel(title)
    return page


def main() -> None:
    results = measure_each(__file__, [NAME], measure)
    columns = {"score relative to the teacher's": lambda row: f"{row['score'] / row['teacher_score']:.3f}"}
    write(__file__, results, table(results, columns), draw(results[NAME]))


if __name__ == "__main__":
    main()
