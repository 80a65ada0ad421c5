//! Trains a small model with an MoE layer on Burn's learner twice, from the same seed: with the phase router, which drops nothing at capacity factor
//! 1.0, and with plain top-k, which drops past it in order of arrival. Prints both loss curves, survival, gate mass and balance.
//!
//! The task: points of several clusters, unequally many of each; every cluster has a function of its own, so an expert each is worth having, and the
//! experts of the large clusters are wanted by more tokens than they have room for.
//!
//! ```text
//! cargo run --release --features train --example train            # some seconds
//! cargo run --release --features train --example train -- --smoke # two epochs, to see that it runs
//! ```

use std::path::Path;
use std::sync::Arc;

use burn::data::dataloader::batcher::Batcher;
use burn::data::dataloader::{DataLoader, DataLoaderBuilder};
use burn::data::dataset::InMemDataset;
use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::optim::AdamWConfig;
use burn::tensor::{Device, ExecutionError, Tensor, TensorData};
use burn::train::logger::{EvaluationProgressLogger, TrainingProgressLogger};
use burn::train::metric::MetricDefinition;
use burn::train::metric::{Adaptor, ItemLazy, LossInput, LossMetric};
use burn::train::renderer::{
    EvaluationName, MetricState, MetricsRenderer, MetricsRendererEvaluation, MetricsRendererTraining,
};
use burn::train::{InferenceStep, Learner, LearnerSummary, SupervisedTraining, TrainOutput, TrainStep};
use phase_moe_burn::metric::{BalanceMetric, GateMassMetric, RouteInput, SurvivalMetric};
use phase_moe_burn::{CapacityRule, LayerState, Moe, MoeConfig, RouterKind, load_balancing_loss};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const INPUTS: usize = 12;
const OUTPUTS: usize = 4;
const CLUSTERS: usize = 8;
const HIDDEN: usize = 24;

/// A point and what its cluster's function makes of it.
#[derive(Clone, Debug)]
struct Point {
    at: [f32; INPUTS],
    to: [f32; OUTPUTS],
}

/// Clusters of unequal size, each somewhere else and with a function of its own.
fn points(count: usize, seed: u64) -> Vec<Point> {
    // Clusters are the same whatever is drawn of them.
    let mut task = ChaCha8Rng::seed_from_u64(7);
    let clusters: Vec<_> = (0..CLUSTERS)
        .map(|_| {
            let centre: [f32; INPUTS] = std::array::from_fn(|_| task.random_range(-2.0..2.0));
            let function: [[f32; INPUTS]; OUTPUTS] =
                std::array::from_fn(|_| std::array::from_fn(|_| task.random_range(-1.0..1.0)));
            (centre, function)
        })
        .collect();
    // The first is three times as likely as the last.
    let likely: Vec<f32> = (0..CLUSTERS).map(|cluster| 3.0 - 2.0 * cluster as f32 / (CLUSTERS - 1) as f32).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let draw = |_| {
        let mut left = rng.random_range(0.0..likely.iter().sum());
        let cluster = likely.iter().position(|share| {
            left -= share;
            left < 0.0
        });
        let (centre, function) = &clusters[cluster.unwrap_or(CLUSTERS - 1)];
        let near: [f32; INPUTS] = std::array::from_fn(|_| rng.random_range(-1.0..1.0));
        let row = |row: &[f32; INPUTS]| row.iter().zip(near).map(|(weight, x)| weight * x).sum::<f32>().tanh();
        Point {
            at: std::array::from_fn(|axis| centre[axis] + near[axis]),
            to: std::array::from_fn(|axis| row(&function[axis])),
        }
    };
    (0..count).map(draw).collect()
}

#[derive(Clone, Debug)]
struct Batch {
    at: Tensor<2>,
    to: Tensor<2>,
}

struct Points;

impl Batcher<Point, Batch> for Points {
    fn batch(&self, points: Vec<Point>, device: &Device) -> Batch {
        let tensor = |values: Vec<f32>| {
            let shape = [points.len(), values.len() / points.len()];
            Tensor::from_data(TensorData::new(values, shape), device)
        };
        Batch {
            at: tensor(points.iter().flat_map(|point| point.at).collect()),
            to: tensor(points.iter().flat_map(|point| point.to).collect()),
        }
    }
}

#[derive(Module, Debug)]
struct Model {
    input: Linear,
    moe: Moe,
    output: Linear,
}

/// What a step gives: the loss for its metric, and what the layer routed for those of this crate.
struct Output {
    loss: Tensor<1>,
    routes: RouteInput,
}

impl ItemLazy for Output {
    fn sync(self) -> Result<Self, ExecutionError> {
        Ok(Self { loss: self.loss.without_autodiff(), ..self })
    }
}

impl Adaptor<LossInput> for Output {
    fn adapt(&self) -> LossInput {
        LossInput::new(self.loss.clone())
    }
}

impl Adaptor<RouteInput> for Output {
    fn adapt(&self) -> RouteInput {
        self.routes.clone()
    }
}

impl Model {
    fn new(router: RouterKind, device: &Device) -> Self {
        device.seed(1);
        let rule = CapacityRule::per_expert(1.0);
        Self {
            input: LinearConfig::new(INPUTS, HIDDEN).init(device),
            moe: MoeConfig::new(HIDDEN, 16, CLUSTERS, 2).with_router(router).with_capacity(rule).init(device),
            output: LinearConfig::new(HIDDEN, OUTPUTS).init(device),
        }
    }

    /// The loss of the task, and with it what keeps the gate from sending everything to the same experts.
    fn losses(&self, batch: Batch) -> (Output, Tensor<1>) {
        let hidden = self.input.forward(batch.at);
        let (routed_out, routed) = match self.moe.route(hidden.clone(), &mut LayerState::default()) {
            Ok(answer) => answer,
            Err(error) => panic!("{error}"),
        };
        let loss = (self.output.forward(hidden + routed_out) - batch.to).square().mean();
        let all = loss.clone() + load_balancing_loss(&routed) * 0.01;
        let routes = RouteInput::new([&routed]).unwrap_or_else(|error| panic!("{error}"));
        (Output { loss, routes }, all)
    }
}

impl TrainStep for Model {
    type Input = Batch;
    type Output = Output;

    fn step(&self, batch: Batch) -> TrainOutput<Output> {
        let (output, loss) = self.losses(batch);
        TrainOutput::new(self, loss.backward(), output)
    }
}

impl InferenceStep for Model {
    type Input = Batch;
    type Output = Output;

    fn step(&self, batch: Batch) -> Output {
        self.losses(batch).0
    }
}

/// Shows nothing while it trains: the table at the end says it all.
struct Quiet;

impl MetricsRendererTraining for Quiet {
    fn update_train(&mut self, _: MetricState) {}
    fn update_valid(&mut self, _: MetricState) {}
}

impl MetricsRendererEvaluation for Quiet {
    fn update_test(&mut self, _: EvaluationName, _: MetricState) {}
}

impl TrainingProgressLogger for Quiet {
    fn start(&mut self, _: usize, _: usize, _: Option<usize>, _: Option<&str>) {}
    fn update_epoch(&mut self, _: usize) {}
    fn start_split(&mut self, _: &str, _: usize) {}
    fn update_split(&mut self, _: usize) {}
    fn end_split(&mut self) {}
    fn end(&mut self) {}
    fn log_event_training(&mut self, _: String) {}
}

impl EvaluationProgressLogger for Quiet {
    fn start_global_progress(&mut self, _: usize) {}
    fn start_test(&mut self, _: &str, _: usize) {}
    fn update_test_progress(&mut self, _: usize) {}
    fn end_test(&mut self) {}
    fn end_global_progress(&mut self) {}
    fn log_event_evaluation(&mut self, _: String) {}
}

impl MetricsRenderer for Quiet {
    fn manual_close(&mut self) {}
    fn register_metric(&mut self, _: MetricDefinition) {}
}

const METRICS: [&str; 4] = ["Loss", "MoE survival", "MoE gate mass", "MoE load variation"];

/// Trains and returns, metric by metric, what the validation set gave after each epoch.
fn train(router: RouterKind, epochs: usize, directory: &Path) -> Vec<Vec<f64>> {
    let device = Device::flex().autodiff();
    let loader = |points: Vec<Point>| -> Arc<dyn DataLoader<Batch>> {
        let builder = DataLoaderBuilder::new(Points).batch_size(256).set_device(device.clone());
        builder.shuffle(3).build(InMemDataset::new(points))
    };
    let training = SupervisedTraining::new(directory, loader(points(4096, 1)), loader(points(1024, 2)))
        .metric_train_numeric(LossMetric::new())
        .metric_valid_numeric(LossMetric::new())
        .metric_train_numeric(SurvivalMetric::default())
        .metric_valid_numeric(SurvivalMetric::default())
        .metric_train_numeric(GateMassMetric::default())
        .metric_valid_numeric(GateMassMetric::default())
        .metric_train_numeric(BalanceMetric::default())
        .metric_valid_numeric(BalanceMetric::default())
        .renderer(Box::new(Quiet))
        .with_application_logger(None)
        .num_epochs(epochs);
    let result = training.launch(Learner::new(Model::new(router, &device), AdamWConfig::new().init(), 1e-2));
    assert!(result.error.is_none(), "{:?}", result.error);
    drop(result);
    let summary = LearnerSummary::new(directory, &METRICS).unwrap_or_else(|error| panic!("{error}"));
    let named =
        |name: &str| summary.metrics.valid.iter().find(|metric| metric.name == name).map(|metric| &metric.entries);
    METRICS.map(|name| named(name).into_iter().flatten().map(|entry| entry.value).collect()).to_vec()
}

fn main() {
    let epochs = if std::env::args().any(|argument| argument == "--smoke") { 2 } else { 15 };
    let [phase, dropping] = [RouterKind::Phase, RouterKind::TopKArrival].map(|router| {
        let directory = tempfile::tempdir().expect("a directory for the learner's logs");
        train(router, epochs, directory.path())
    });
    println!("validation, after each epoch: phase | top-k that drops by arrival, both at capacity factor 1.0");
    println!(
        "| epoch | loss | | survival, % | | gate mass, % | | load variation | |\n|---|---|---|---|---|---|---|---|---|"
    );
    for epoch in 0..epochs {
        let cells: Vec<String> = phase
            .iter()
            .zip(&dropping)
            .map(|(phase, other)| format!("{:.4} | {:.4}", phase[epoch], other[epoch]))
            .collect();
        println!("| {} | {} |", epoch + 1, cells.join(" | "));
    }
    assert!(phase[1].iter().all(|&survival| survival == 100.0), "the phase router drops nothing");
}
