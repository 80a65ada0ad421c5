//! The four capacity experiments of the published phase router, as mean ± deviation over seeds instead of one seed:
//! headroom, experts per token, size and skew, for the published kernel and for routers that are as blind to the gate.
//!
//! N tokens meet N experts, k = 2, profile `strong`, headroom 1.2 unless a row says otherwise. Survival in percent of N·k
//! slots; `room` is the capacity over the demand. Capacities are rounded up as the published benchmark does, which hides
//! slack, and then once more exact, so that headroom 1.0 means 1.0.
//!
//! ```text
//! cargo run --release --no-default-features --example capacity_experiments -- [--smoke] [--json]
//! ```

use std::process::ExitCode;

use phase_moe::routing::{PhaseSide, Profile, Rounding, Shares, permutations, phase_ring};
use phase_moe::{
    Assignment, Capacity, CapacityRule, Logits, Result, RouteContext, RouteRequest, RouteState, RouterKind, Scores,
    Scoring,
};

const PROFILES: [Profile; 4] = [Profile::Uniform, Profile::Mild, Profile::Strong, Profile::Extreme];

/// Columns of the table; the kernel runs in its square form, the others through their routers.
const METHODS: [RouterKind; 4] =
    [RouterKind::PhaseKernel, RouterKind::Hash, RouterKind::WeightedHash, RouterKind::PhaseQuota];
/// Share of the ring that a row of the kernel covers, as published.
const DENSITY: f64 = 0.3;
/// A capacity factor that leaves room for every slot in every expert.
const WIDE: f64 = 1e5;
const SEEDS: u64 = 20;
/// Tokens and experts where a row says nothing else.
const SIZE: usize = 1024;
const SMOKE_SEEDS: u64 = 2;
const SMOKE_SIZE: usize = 512;

/// One row of the table.
#[derive(Clone)]
struct Scenario {
    experiment: &'static str,
    label: String,
    size: usize,
    top_k: usize,
    headroom: f64,
    profile: Profile,
    rounding: Rounding,
}

/// Survival of one method over the seeds, in percent.
struct Survival {
    mean: f64,
    deviation: f64,
}

fn main() -> ExitCode {
    let (mut smoke, mut json) = (false, false);
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--smoke" => smoke = true,
            "--json" => json = true,
            _ => {
                eprintln!("unknown argument `{argument}`: expected --smoke or --json");
                return ExitCode::from(2);
            }
        }
    }
    match run(if smoke { SMOKE_SEEDS } else { SEEDS }, smoke, json) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(seeds: u64, smoke: bool, json: bool) -> Result<()> {
    let mut scenarios = scenarios(Rounding::Ceil);
    scenarios.extend(self::scenarios(Rounding::Exact));
    if smoke {
        scenarios.retain(|scenario| scenario.experiment != "size" || scenario.size <= SMOKE_SIZE);
        scenarios.iter_mut().for_each(|scenario| scenario.size = scenario.size.min(SMOKE_SIZE));
    }
    let mut scores = flat_scores(1)?;
    let mut heading = None;
    let mut lines = Vec::new();
    for scenario in scenarios {
        if scores.tokens() != scenario.size {
            scores = flat_scores(scenario.size)?;
        }
        let (room, survivals) = measure(&scenario, &scores, seeds)?;
        if json {
            lines.push(json_line(&scenario, seeds, room, &survivals));
            continue;
        }
        if heading != Some((scenario.rounding, scenario.experiment)) {
            if heading.map(|(rounding, _)| rounding) != Some(scenario.rounding) {
                print_title(scenario.rounding, seeds, if smoke { SMOKE_SIZE } else { SIZE });
            }
            heading = Some((scenario.rounding, scenario.experiment));
            print!("\n{:<24}{:>8}", scenario.experiment, "room");
            METHODS.iter().for_each(|method| print!("{:>16}", method.name()));
            println!();
        }
        print!("{:<24}{room:>8.2}", scenario.label);
        survivals.iter().for_each(|s| print!("{:>16}", format!("{:.1} ± {:.1}", s.mean, s.deviation)));
        println!();
    }
    if json {
        println!("[\n{}\n]", lines.join(",\n"));
    }
    Ok(())
}

/// The rows of the four experiments.
fn scenarios(rounding: Rounding) -> Vec<Scenario> {
    // Exact capacities are tried at headroom 1.0, where every slot counts.
    let headroom = if rounding == Rounding::Exact { 1.0 } else { 1.2 };
    let usual = Scenario {
        experiment: "headroom",
        label: String::new(),
        size: SIZE,
        top_k: 2,
        headroom,
        profile: Profile::Strong,
        rounding,
    };
    let mut rows = Vec::new();
    for headroom in [1.0, 1.1, 1.2, 1.5, 2.0] {
        rows.push(Scenario { label: format!("headroom {headroom:.1}"), headroom, ..usual.clone() });
    }
    for top_k in [1, 2, 4, 8, 16] {
        rows.push(Scenario { experiment: "experts per token", label: format!("k {top_k}"), top_k, ..usual.clone() });
    }
    for size in [256, 512, 1024, 2048, 4096] {
        rows.push(Scenario { experiment: "size", label: format!("N {size}"), size, ..usual.clone() });
    }
    let headrooms: &[f64] = if rounding == Rounding::Exact { &[1.0] } else { &[1.0, 1.2] };
    for &headroom in headrooms {
        for profile in PROFILES {
            let label = format!("{profile}, headroom {headroom:.1}");
            rows.push(Scenario { experiment: "profile", label, headroom, profile, ..usual.clone() });
        }
    }
    rows
}

/// Gate scores that want nothing: the methods do not look at them.
fn flat_scores(size: usize) -> Result<Scores> {
    Scoring::softmax().scores(&Logits::new(&vec![0.0; size * size], size, size)?, None)
}

/// Room over demand, and survival per method.
fn measure(scenario: &Scenario, scores: &Scores, seeds: u64) -> Result<(f64, Vec<Survival>)> {
    let slots = (scenario.size * scenario.top_k) as f64;
    let mut room = 0.0;
    let mut percent = vec![Vec::new(); METHODS.len()];
    for seed in 0..seeds {
        let rule = |factor, rounding| {
            let shares = Shares::PerExpert { profile: scenario.profile, seed };
            CapacityRule::new(factor, shares).with_rounding(rounding).with_minimum_mean(0.0)
        };
        let capacity =
            rule(scenario.headroom, scenario.rounding).capacity(scenario.size, scenario.size, scenario.top_k)?;
        room += capacity.limits().unwrap_or_default().iter().map(|&limit| f64::from(limit)).sum::<f64>()
            / slots
            / seeds as f64;
        for (method, percent) in METHODS.iter().zip(&mut percent) {
            let kept = match method {
                RouterKind::PhaseKernel => square_kernel_kept(scenario, &capacity, seed)?,
                // Draws in proportion to the weights, as the kernel does; rounded-up capacities would favour the small.
                RouterKind::WeightedHash => {
                    let wide = rule(WIDE, Rounding::Exact).capacity(scenario.size, scenario.size, scenario.top_k)?;
                    kept_of(route(*method, scenario, scores, &wide, seed)?.load(), &capacity)
                }
                _ => route(*method, scenario, scores, &capacity, seed)?.kept(),
            };
            percent.push(100.0 * kept as f64 / slots);
        }
    }
    Ok((room, percent.iter().map(|percent| Survival::new(percent)).collect()))
}

/// One batch through a router.
fn route(kind: RouterKind, scenario: &Scenario, scores: &Scores, capacity: &Capacity, seed: u64) -> Result<Assignment> {
    let request = RouteRequest::new(scores, scenario.top_k, capacity, RouteContext::default())?;
    kind.build(seed).route(&request, &mut RouteState::default())
}

/// Slots that the published kernel keeps: one column per expert, all sources alike, targets in proportion to the weights.
fn square_kernel_kept(scenario: &Scenario, capacity: &Capacity, seed: u64) -> Result<usize> {
    let size = scenario.size as f64;
    let weights = scenario.profile.weights(scenario.size, seed);
    let mean = weights.iter().sum::<f64>() / size;
    let degree = |weight: f64| (weight * DENSITY * size).round().clamp(1.0, size) as u32;
    let [source_order, target_order] = permutations(scenario.size as u32, seed);
    let sources = PhaseSide::new(vec![degree(1.0); scenario.size], source_order)?;
    let targets = PhaseSide::new(weights.iter().map(|weight| degree(weight / mean)).collect(), target_order)?;
    let columns = phase_ring(sources, targets, scenario.top_k, seed)?;

    let mut load = vec![0u32; scenario.size];
    columns.iter().filter_map(|&column| usize::try_from(column).ok()).for_each(|column| load[column] += 1);
    Ok(kept_of(load, capacity))
}

/// Slots of `load` that there is room for.
fn kept_of(load: Vec<u32>, capacity: &Capacity) -> usize {
    let limits = capacity.limits().unwrap_or_default();
    load.iter().zip(limits).map(|(&load, &limit)| load.min(limit) as usize).sum()
}

impl Survival {
    fn new(percent: &[f64]) -> Self {
        let count = percent.len() as f64;
        let mean = percent.iter().sum::<f64>() / count;
        let squares: f64 = percent.iter().map(|value| (value - mean).powi(2)).sum();
        Self { mean, deviation: (squares / (count - 1.0)).sqrt() }
    }
}

fn print_title(rounding: Rounding, seeds: u64, size: usize) {
    let (title, headroom) = match rounding {
        Rounding::Ceil => ("Capacities rounded up, as published", 1.2),
        Rounding::Exact => ("\nCapacities that sum to headroom times the demand", 1.0),
    };
    println!("{title}. Survival in %, mean ± deviation over {seeds} seeds.");
    println!("Where a row says nothing else: N {size}, k 2, profile strong, headroom {headroom:.1}.");
}

fn json_line(scenario: &Scenario, seeds: u64, room: f64, survivals: &[Survival]) -> String {
    let methods = METHODS.iter().zip(survivals).map(|(method, survival)| {
        format!(r#""{}":{{"mean":{:.4},"deviation":{:.4}}}"#, method.name(), survival.mean, survival.deviation)
    });
    format!(
        r#"{{"experiment":"{}","tokens":{},"experts":{},"top_k":{},"headroom":{},"profile":"{}","rounding":"{}","seeds":{seeds},"room":{room:.4},"survival_percent":{{{}}}}}"#,
        scenario.experiment,
        scenario.size,
        scenario.size,
        scenario.top_k,
        scenario.headroom,
        scenario.profile,
        if scenario.rounding == Rounding::Exact { "exact" } else { "ceil" },
        methods.collect::<Vec<_>>().join(",")
    )
}
