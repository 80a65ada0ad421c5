//! A router that writes down what another one does, layer by layer and step by step, with what was in fast memory: for commands that
//! hand a router over and see no batches themselves.
//!
//! Knows nothing of text.

use std::sync::{Arc, Mutex, PoisonError};

use phase_moe::offload::RequestLog;
use phase_moe::{Assignment, ExpertSet, PhaseRouter, Result, RouteRequest, RouteState, Router, Scratch};
use serde_json::{Value, json, to_value};

use super::layer::Answered;
use super::{MOST_TOKENS, RunSeen};

/// Steps of which the resident experts are shown.
const MOST_STEPS: usize = 512;

/// Writes down what `router` does.
pub struct Recorder {
    router: Arc<dyn Router>,
    /// The layers' indices, as routers are told them.
    layers: Vec<usize>,
    written: Mutex<Written>,
}

struct Written {
    run: RunSeen,
    /// Of each layer.
    memory: Vec<MemorySeen>,
    /// What finds a bound where the router itself knows none.
    bounds: Vec<RouteState>,
}

#[derive(Default)]
struct MemorySeen {
    steps: u64,
    misses: u64,
    requests: u64,
    log: RequestLog,
    /// Experts that were asked for so far.
    asked: ExpertSet,
    /// A hexadecimal number for each step from the second on: what was in memory as it began.
    resident: Vec<String>,
}

impl Recorder {
    /// For layers with these indices.
    pub fn new(router: Arc<dyn Router>, name: String, layers: Vec<usize>) -> Arc<Self> {
        let count = layers.len();
        let written = Written {
            run: RunSeen::new(name, router.name(), count, true),
            memory: (0..count).map(|_| MemorySeen::default()).collect(),
            bounds: vec![RouteState::default(); count],
        };
        Arc::new(Self { router, layers, written: Mutex::new(written) })
    }

    /// The run, as the document wants it.
    pub fn run(&self) -> anyhow::Result<Value> {
        Ok(to_value(&self.written.lock().unwrap_or_else(PoisonError::into_inner).run)?)
    }

    /// What was in memory and what was read, with so many experts' room in each layer and `bytes` an expert; `None` where no account was
    /// kept of one.
    pub fn cache(&self, name: &str, rooms: &[usize], bytes: Option<u64>) -> Option<Value> {
        let written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let sum = |of: fn(&MemorySeen) -> u64| written.memory.iter().map(of).sum::<u64>();
        let (requests, misses) = (sum(|layer| layer.requests), sum(|layer| layer.misses));
        if requests == 0 {
            return None;
        }
        let layers = written.memory.iter().zip(rooms);
        let best: u64 = layers.map(|(layer, &room)| layer.log.most_hits(room) as u64).sum();
        let tokens = written.run.layers.iter().map(|layer| layer.tokens()).max().unwrap_or(0).max(1);
        let read = |misses: u64| bytes.map(|bytes| bytes as f64 * misses as f64 / tokens as f64);
        let layers = written.memory.iter().zip(&self.layers).map(
            |(memory, layer)| json!({"layer": layer, "steps": memory.steps, "shown": memory.resident.len(), "resident": memory.resident}),
        );
        let rate = |hits: u64| hits as f64 / requests as f64;
        Some(json!({
            "name": name,
            "cached_experts": rooms.iter().min(),
            "hit_rate": rate(requests - misses),
            "belady_hit_rate": rate(best),
            "bytes_per_token": read(misses),
            "belady_bytes_per_token": read(requests - best),
            "layers": layers.collect::<Vec<_>>(),
        }))
    }
}

/// A set as a hexadecimal number, expert 0 its lowest bit.
fn hexadecimal(set: &ExpertSet, experts: usize) -> String {
    let mut digits = vec![0u32; experts.div_ceil(4)];
    set.iter().for_each(|expert| digits[expert.index() / 4] |= 1 << (expert.index() % 4));
    digits.iter().rev().filter_map(|&digit| char::from_digit(digit, 16)).collect()
}

impl Router for Recorder {
    fn name(&self) -> &'static str {
        self.router.name()
    }

    fn respects_capacity(&self) -> bool {
        self.router.respects_capacity()
    }

    fn keeps_top_k(&self) -> bool {
        self.router.keeps_top_k()
    }

    fn route_into(
        &self,
        request: &RouteRequest<'_>,
        state: &mut RouteState,
        scratch: &mut Scratch,
        assignment: &mut Assignment,
    ) -> Result<()> {
        self.router.route_into(request, state, scratch, assignment)?;
        let index = request.context().layer;
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        // A command that asks for a layer that it did not announce shows nothing of it.
        let Some(layer) = self.layers.iter().position(|&layer| layer == index) else { return Ok(()) };
        let Written { run, memory, bounds } = &mut *written;
        let bounded = self.router.respects_capacity() && self.router.keeps_top_k();
        let bound = match assignment.gate_mass_bound() {
            None if bounded && request.capacity().limits().is_some() => {
                PhaseRouter::default().route(request, &mut bounds[layer])?.gate_mass_bound()
            }
            bound => bound,
        };
        let answered = Answered { request, assignment, prices: state.prices(), bound };
        let choice = answered.choice()?;
        run.layers[layer].add(&answered, &choice);
        let experts = request.scores().experts();
        let seen = &memory[layer].asked;
        // While there is room, routers are told that every expert is in memory, so that nothing is swapped: what is there then is what was
        // asked for.
        let resident = request.context().resident.map(|resident| match resident.len() == experts {
            true if memory[layer].steps == 0 => ExpertSet::new(experts),
            true => Ok(seen.clone()),
            false => Ok(resident.clone()),
        });
        let resident = resident.transpose()?;
        if let Some(words) = &mut run.words {
            let rows = (0..request.scores().tokens()).filter(|&row| !request.is_padding(row));
            let left = MOST_TOKENS.saturating_sub(words[layer].len());
            words[layer].add(&answered, &choice, rows.take(left), resident.as_ref());
        }
        if let Some(resident) = resident {
            let memory = &mut memory[layer];
            if memory.steps == 0 {
                memory.asked = ExpertSet::new(experts)?;
            }
            let mut asked = ExpertSet::default();
            assignment.used_experts(&mut asked)?;
            memory.requests += asked.len() as u64;
            memory.misses += asked.iter().filter(|&expert| !resident.contains(expert)).count() as u64;
            memory.log.push(&asked);
            for expert in asked.iter() {
                memory.asked.insert(expert);
            }
            if memory.steps > 0 && memory.resident.len() < MOST_STEPS {
                memory.resident.push(hexadecimal(&resident, experts));
            }
            memory.steps += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use phase_moe::{Capacity, ExpertId, Logits, RouteContext, Scoring, TopK};

    use super::*;

    #[test]
    fn what_the_router_did_and_what_was_in_memory_is_written_down() {
        let recorder = Recorder::new(Arc::new(TopK { drop: None }), "plain".into(), vec![3]);
        let free = Capacity::unlimited(6).unwrap();
        let mut state = RouteState::default();
        // Expert 5 is wanted twice, then expert 1; nothing is in memory, so routers are told that all is, then 5 is, and stays.
        for (step, (wanted, held)) in [(5, 0..6), (5, 5..6), (1, 5..6)].into_iter().enumerate() {
            let logits: Vec<f32> = (0..6).map(|expert| if expert == wanted { 1.0 } else { 0.0 }).collect();
            let scores = Scoring::softmax().scores(&Logits::new(&logits, 1, 6).unwrap(), None).unwrap();
            let mut resident = ExpertSet::new(6).unwrap();
            for expert in held {
                resident.insert(ExpertId::new(expert, 6).unwrap());
            }
            let context =
                RouteContext { layer: 3, step: step as u64, resident: Some(&resident), ..RouteContext::default() };
            let request = RouteRequest::new(&scores, 1, &free, context).unwrap();
            recorder.route(&request, &mut state).unwrap();
        }
        let cache = recorder.cache("lru", &[1], Some(30)).unwrap();
        assert_eq!((&cache["hit_rate"], &cache["belady_hit_rate"]), (&json!(1.0 / 3.0), &json!(1.0 / 3.0)));
        assert_eq!((&cache["bytes_per_token"], &cache["belady_bytes_per_token"]), (&json!(20.0), &json!(20.0)));
        assert_eq!(cache["layers"], json!([{"layer": 3, "steps": 3, "shown": 2, "resident": ["20", "20"]}]));
        let run = recorder.run().unwrap();
        assert_eq!((&run["words"][0]["misses"], &run["words"][0]["fate"]), (&json!("101"), &json!("===")));
        assert_eq!(run["layers"][0]["loads"], json!([0, 1, 0, 0, 0, 2]));
    }
}
