//! A Candle `VarBuilder` that gives the experts of a stack one by one, so that models which know experts only so can read
//! checkpoints that hold all of a layer's in one tensor.
//!
//! Asked for `{ffn}.experts.3.gate_proj.weight`, `[width, hidden]`, it reads expert 3's rows of `{ffn}.experts.gate_up_proj`,
//! and no others: `[experts, 2·width, hidden]`, or each expert's matrix transposed, or gate and up rows in turns; likewise
//! up and down projections. [`ExpertNames`] says what things are called on both sides. A tensor that is there under the name
//! asked for is read as it is, and so is everything else.
//!
//! Where rows come first an expert's matrix is a run of bytes in the file and just these are read. A transposed expert is read
//! whole for each of its projections and turned. Nothing is kept.
//!
//! ```
//! use std::sync::Arc;
//! use candle_core::{DType, Device};
//! use phase_moe::{Checkpoint, ExpertNames};
//! use phase_moe::checkpoint::{NamedTensor, tensor_bytes};
//! use phase_moe::decoder::unstacked_var_builder;
//!
//! # let directory = std::env::temp_dir().join(format!("phase-moe-unstacked-{}", std::process::id()));
//! # std::fs::create_dir_all(&directory)?;
//! let (gate_up, down) = ((0..2 * 6 * 4).map(|n| n as f32).collect::<Vec<_>>(), [0.5; 2 * 4 * 3]);
//! let stacks = [
//!     NamedTensor::f32("mlp.experts.gate_up_proj", [2, 6, 4], &gate_up), // two experts of width 3 on a hidden state of 4
//!     NamedTensor::f32("mlp.experts.down_proj", [2, 4, 3], &down),
//! ];
//! std::fs::write(&directory.join("model.safetensors"), tensor_bytes(&stacks, None)?)?;
//!
//! let checkpoint = Arc::new(Checkpoint::open(&directory)?);
//! let vb = unstacked_var_builder(checkpoint, ExpertNames::default(), DType::F32, &Device::Cpu);
//! let expert = vb.pp("mlp.experts.1"); // what a model of Candle asks for
//! assert!(expert.contains_tensor("up_proj.weight") && !vb.contains_tensor("mlp.experts.2.up_proj.weight"));
//! assert_eq!(expert.get((3, 4), "up_proj.weight")?.get(0)?.to_vec1::<f32>()?, [36.0, 37.0, 38.0, 39.0]);
//! # std::fs::remove_dir_all(&directory)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Knows nothing of biases of stacked experts, and of no model.

use std::sync::Arc;

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};

use super::builder::{self, FileRows};
use crate::checkpoint::{Checkpoint, TensorEntry};
use crate::error::{Error, Result};
use crate::layer::load::projections;
use crate::layer::projection::Weight;
use crate::offload::store::Part;
use crate::spec::{ExpertNames, MoeSpec};
use crate::weights::experts::{slices, stack_order};

/// A builder whose tensors come from `checkpoint`, on `device`, in `dtype`; experts that are stacked there under the names that
/// `names` has for stacks can be asked for one by one under those it has for single experts.
pub fn unstacked_var_builder(
    checkpoint: Arc<Checkpoint>,
    names: ExpertNames,
    dtype: DType,
    device: &Device,
) -> VarBuilder<'static> {
    let stored = builder::over(checkpoint.clone(), dtype, device);
    VarBuilder::from_backend(Box::new(Unstacked { checkpoint, names, stored }), dtype, device.clone())
}

struct Unstacked {
    checkpoint: Arc<Checkpoint>,
    names: ExpertNames,
    /// The same checkpoint as it is.
    stored: VarBuilder<'static>,
}

/// One projection of an expert that is stacked.
struct Request<'a> {
    /// What the model asked for.
    name: &'a str,
    part: Part,
    expert: usize,
    /// What stands before the names of its layer.
    prefix: &'a str,
}

impl Unstacked {
    /// What `name` is a projection of, where it is one that the checkpoint holds in a stack alone.
    fn request<'a>(&self, name: &'a str) -> Option<Request<'a>> {
        if self.checkpoint.tensors().contains_key(name) {
            return None;
        }
        let ExpertNames { experts, gate_proj, up_proj, down_proj, stacked_gate_up, stacked_down, .. } = &self.names;
        let projections = [(Part::Gate, gate_proj), (Part::Up, up_proj), (Part::Down, down_proj)];
        let weight = name.strip_suffix(".weight")?;
        let (part, expert) =
            projections.into_iter().find_map(|(part, of)| Some((part, weight.strip_suffix(of)?.strip_suffix('.')?)))?;
        let (parent, id) = expert.rsplit_once('.')?;
        let prefix = parent.strip_suffix(experts.as_str())?;
        if !(prefix.is_empty() || prefix.ends_with('.')) {
            return None;
        }
        let is_there = |stack: &String| self.checkpoint.tensors().contains_key(&format!("{prefix}{stack}"));
        let there = is_there(stacked_gate_up) || is_there(stacked_down);
        there.then_some(Request { name, part, expert: id.parse().ok()?, prefix })
    }

    /// The experts of its layer, by the shapes of both stacks, and the tensor that holds the projection.
    fn layer(&self, request: &Request<'_>) -> Result<(MoeSpec, &TensorEntry)> {
        let [gate_up, down] =
            [&self.names.stacked_gate_up, &self.names.stacked_down].map(|stack| format!("{}{stack}", request.prefix));
        let [of_gate_up, of_down] = [self.checkpoint.entry(&gate_up), self.checkpoint.entry(&down)];
        let (of_gate_up, of_down) = (of_gate_up?, of_down?);
        let spec = stacked(&self.names, &of_gate_up.shape, &of_down.shape).ok_or_else(|| {
            let expected = "expected [experts, 2·width, hidden] and [experts, hidden, width], or both transposed";
            let detail = format!("{expected}, got {:?} and {:?} of `{down}`", of_gate_up.shape, of_down.shape);
            self.checkpoint.wrong(of_gate_up, &gate_up, detail)
        })?;
        let (entry, stack) = if request.part == Part::Down { (of_down, down) } else { (of_gate_up, gate_up) };
        if request.expert >= spec.experts {
            let detail = format!("expected one of the {} experts of `{stack}`, got {}", spec.experts, request.expert);
            return Err(self.checkpoint.wrong(entry, request.name, detail));
        }
        Ok((spec, entry))
    }

    /// The projection, `[out, in]`, contiguous.
    fn projection(&self, request: &Request<'_>, layer: &MoeSpec, dtype: DType, device: &Device) -> Result<Tensor> {
        let slices = slices(layer, request.prefix, request.expert, self.checkpoint.as_ref())?;
        let rows = FileRows { checkpoint: &self.checkpoint, dtype: Some(dtype), device, name: Some(request.name) };
        let holds = |part: Part| part == request.part || (part == Part::GateUp && request.part != Part::Down);
        let slice = slices.iter().find(|slice| holds(slice.part));
        let held = slice.map(|slice| projections(slice, self.names.stacked_in_turns, &rows)).transpose()?;
        match held.into_iter().flatten().find(|(part, _)| *part == request.part) {
            Some((_, Weight::Dense(weight))) => Ok(weight.contiguous()?),
            _ => Err(Error::shape(request.name, "floats", "others")),
        }
    }
}

/// Gated experts whose stacks have these shapes. Both shapes together always tell how they lie.
fn stacked(names: &ExpertNames, gate_up: &[usize], down: &[usize]) -> Option<MoeSpec> {
    let (&[experts, ..], &[_, rows, columns]) = (gate_up, down) else { return None };
    [(rows, columns), (columns, rows)].into_iter().find_map(|(hidden, width)| {
        let spec = MoeSpec { names: names.clone(), ..MoeSpec::new(hidden, experts, 1, width).ok()? };
        stack_order(&spec, gate_up, down).is_ok().then_some(spec)
    })
}

impl SimpleBackend for Unstacked {
    fn get(&self, shape: Shape, name: &str, init: Init, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        let Some(request) = self.request(name) else {
            return self.stored.clone().set_device(device.clone()).get_with_hints_dtype(shape, name, init, dtype);
        };
        let (layer, entry) = self.layer(&request)?;
        let there = match request.part {
            Part::Down => [layer.hidden, layer.expert_width],
            _ => [layer.expert_width, layer.hidden],
        };
        if shape.dims() != there {
            let got = format!("got {there:?} in a stack of {:?}", entry.shape);
            return Err(self.checkpoint.wrong(entry, name, format!("expected shape {:?}, {got}", shape.dims())).into());
        }
        Ok(self.projection(&request, &layer, dtype, device)?)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        match self.request(name) {
            Some(request) => Ok(self.projection(&request, &self.layer(&request)?.0, dtype, device)?),
            None => self.stored.clone().set_device(device.clone()).get_unchecked_dtype(name, dtype),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.request(name).map_or_else(|| self.stored.contains_tensor(name), |request| self.layer(&request).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{NamedTensor, tensor_bytes};
    use crate::weights::experts::Order;

    const EXPERTS: usize = 3;
    const WIDTH: usize = 2;
    const HIDDEN: usize = 5;

    /// Number `column` of row `row` of a projection: none is there twice.
    fn number(expert: usize, part: Part, row: usize, column: usize) -> f32 {
        let part = [Part::Gate, Part::Up, Part::Down].iter().position(|other| *other == part).unwrap();
        (expert * 1000 + part * 100 + row * 10 + column) as f32
    }

    fn matrix(expert: usize, part: Part) -> Vec<Vec<f32>> {
        let (rows, columns) = if part == Part::Down { (HIDDEN, WIDTH) } else { (WIDTH, HIDDEN) };
        (0..rows).map(|row| (0..columns).map(|column| number(expert, part, row, column)).collect()).collect()
    }

    fn transposed(rows: Vec<Vec<f32>>) -> Vec<Vec<f32>> {
        (0..rows[0].len()).map(|column| rows.iter().map(|row| row[column]).collect()).collect()
    }

    /// A checkpoint of stacks under `mlp`, beside a norm, and a builder over it.
    fn builder(order: Order, names: ExpertNames) -> (tempfile::TempDir, VarBuilder<'static>) {
        let stack = |matrix: &dyn Fn(usize) -> Vec<Vec<f32>>| -> (Vec<usize>, Vec<f32>) {
            let matrices = (0..EXPERTS).map(|expert| match order {
                Order::Rows => matrix(expert),
                _ => transposed(matrix(expert)),
            });
            let matrices: Vec<_> = matrices.collect();
            (vec![EXPERTS, matrices[0].len(), matrices[0][0].len()], matrices.into_iter().flatten().flatten().collect())
        };
        let gate_up = |expert| match names.stacked_in_turns {
            false => [matrix(expert, Part::Gate), matrix(expert, Part::Up)].concat(),
            true => {
                matrix(expert, Part::Gate).into_iter().zip(matrix(expert, Part::Up)).flat_map(|(a, b)| [a, b]).collect()
            }
        };
        let ((gate_up_shape, gate_up), (down_shape, down)) =
            (stack(&gate_up), stack(&|expert| matrix(expert, Part::Down)));
        let tensors = [
            NamedTensor::f32(format!("mlp.{}", names.stacked_gate_up), gate_up_shape, &gate_up),
            NamedTensor::f32(format!("mlp.{}", names.stacked_down), down_shape, &down),
            NamedTensor::f32("norm.weight", [2], &[1.0, 2.0]),
        ];
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("model.safetensors"), tensor_bytes(&tensors, None).unwrap()).unwrap();
        let checkpoint = Arc::new(Checkpoint::open(directory.path()).unwrap());
        (directory, unstacked_var_builder(checkpoint, names, DType::F32, &Device::Cpu))
    }

    fn granite() -> ExpertNames {
        let [stacked_gate_up, stacked_down, gate_proj, up_proj, down_proj] =
            ["input_linear.weight", "output_linear.weight", "w1", "w3", "w2"].map(String::from);
        ExpertNames { stacked_gate_up, stacked_down, gate_proj, up_proj, down_proj, ..ExpertNames::default() }
    }

    #[test]
    fn every_projection_of_every_expert_is_its_own_however_the_stack_lies() {
        let turns = ExpertNames { stacked_in_turns: true, ..ExpertNames::default() };
        for names in [ExpertNames::default(), granite(), turns] {
            for order in [Order::Rows, Order::Columns] {
                let (_directory, vb) = builder(order, names.clone());
                for expert in 0..EXPERTS {
                    let parts =
                        [(Part::Gate, &names.gate_proj), (Part::Up, &names.up_proj), (Part::Down, &names.down_proj)];
                    for (part, called) in parts {
                        let (vb, expected) = (vb.pp("mlp.experts").pp(expert).pp(called), matrix(expert, part));
                        assert!(vb.contains_tensor("weight"));
                        let checked = vb.get((expected.len(), expected[0].len()), "weight").unwrap();
                        assert!(checked.is_contiguous());
                        assert_eq!(checked.to_vec2::<f32>().unwrap(), expected, "{order:?} {part:?} of {expert}");
                        assert_eq!(vb.get_unchecked("weight").unwrap().to_vec2::<f32>().unwrap(), expected);
                    }
                }
                assert_eq!(vb.get(2, "norm.weight").unwrap().to_vec1::<f32>().unwrap(), [1.0, 2.0]);
                assert!(vb.contains_tensor(&format!("mlp.{}", names.stacked_down)));
                for absent in ["norm.bias", "mlp.experts.3.up_proj.weight", "mlp.experts.x.up_proj.weight"] {
                    assert!(!vb.contains_tensor(absent), "{absent}");
                }
                assert!(!vb.contains_tensor(&format!("ffn.experts.0.{}.weight", names.up_proj)));
                assert!(!vb.contains_tensor(&format!("mlp.my_experts.0.{}.weight", names.up_proj)));
            }
        }
    }

    #[test]
    fn both_shapes_tell_how_a_stack_lies_where_one_does_not() {
        let order = |gate_up: &[usize], down: &[usize]| {
            let spec = stacked(&ExpertNames::default(), gate_up, down)?;
            Some((stack_order(&spec, gate_up, down).unwrap(), spec.expert_width, spec.hidden))
        };
        let rows = |width, hidden| (Order::Rows, width, hidden);
        let columns = |width, hidden| (Order::Columns, width, hidden);
        assert_eq!(order(&[3, 8, 8], &[3, 8, 4]), Some(rows(4, 8)));
        assert_eq!(order(&[3, 8, 8], &[3, 4, 8]), Some(columns(4, 8)));
        assert_eq!(order(&[3, 16, 8], &[3, 8, 8]), Some(rows(8, 8)));
        assert_eq!(order(&[3, 8, 16], &[3, 8, 8]), Some(columns(8, 8)));
        assert_eq!(order(&[3, 8, 8], &[3, 8, 8]), None);
        assert_eq!(order(&[3, 0, 0], &[3, 0, 0]), None);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let (directory, vb) = builder(Order::Rows, ExpertNames::default());
        let shown = |error: candle_core::Error| {
            let error = Error::from(error);
            assert!(matches!(error, Error::Checkpoint { .. }), "{error}");
            error.to_string().replace(&format!("{}/", directory.path().display()), "")
        };
        let experts = vb.pp("mlp.experts");
        assert_eq!(
            shown(experts.get((2, 5), "3.up_proj.weight").unwrap_err()),
            "model.safetensors: tensor `mlp.experts.3.up_proj.weight`: expected one of the 3 experts of \
             `mlp.experts.gate_up_proj`, got 3"
        );
        assert_eq!(
            shown(experts.get((5, 2), "0.up_proj.weight").unwrap_err()),
            "model.safetensors: tensor `mlp.experts.0.up_proj.weight`: expected shape [5, 2], got [2, 5] in a stack of [3, 4, 5]"
        );
        assert_eq!(
            shown(experts.get((2, 5), "0.other.weight").unwrap_err()),
            "model.safetensors: tensor `mlp.experts.0.other.weight`: expected in the checkpoint, got none"
        );
        let file = std::fs::File::options().write(true).open(directory.path().join("model.safetensors")).unwrap();
        file.set_len(file.metadata().unwrap().len() / 4).unwrap();
        let error = shown(experts.get((2, 5), "2.up_proj.weight").unwrap_err());
        assert!(
            error.starts_with("model.safetensors: tensor `mlp.experts.2.up_proj.weight`: expected 40 bytes at "),
            "{error}"
        );
    }

    #[test]
    fn a_stack_without_its_other_half_or_of_another_shape_is_an_error() {
        let open = |tensors: &[NamedTensor]| {
            let directory = tempfile::tempdir().unwrap();
            std::fs::write(directory.path().join("model.safetensors"), tensor_bytes(tensors, None).unwrap()).unwrap();
            let checkpoint = Arc::new(Checkpoint::open(directory.path()).unwrap());
            let vb =
                unstacked_var_builder(checkpoint, ExpertNames::default(), DType::F32, &Device::Cpu).pp("experts.0");
            (vb.contains_tensor("up_proj.weight"), vb.get((2, 5), "up_proj.weight").unwrap_err().to_string())
        };
        let gate_up = NamedTensor::f32("experts.gate_up_proj", [3, 4, 5], &[0.0; 60]);
        let (there, error) = open(std::slice::from_ref(&gate_up));
        assert!(
            !there && error.ends_with("tensor `experts.down_proj`: expected in the checkpoint, got none"),
            "{error}"
        );
        let (there, error) = open(&[gate_up.clone(), NamedTensor::f32("experts.down_proj", [2, 5, 2], &[0.0; 20])]);
        assert!(!there && error.ends_with("got [3, 4, 5] and [2, 5, 2] of `experts.down_proj`"), "{error}");
        let (there, error) = open(&[gate_up, NamedTensor::f32("experts.down_proj", [30], &[0.0; 30])]);
        assert!(
            !there && error.contains("tensor `experts.gate_up_proj`: expected [experts, 2·width, hidden] and "),
            "{error}"
        );
        let integers = ["gate_up_proj", "down_proj"].map(|name| format!("experts.{name}"));
        let (there, error) = open(&[
            NamedTensor::i32(&integers[0], [1, 4, 5], &[0; 20]),
            NamedTensor::i32(&integers[1], [1, 5, 2], &[0; 10]),
        ]);
        assert!(there && error.ends_with("expected dtype F32, BF16 or F16, got I32"), "{error}");
    }

    #[test]
    fn only_the_bytes_asked_for_are_read() {
        use crate::checkpoint::ByteSource;
        use std::sync::Mutex;

        #[derive(Debug)]
        struct Watched(Vec<u8>, Arc<Mutex<Vec<(u64, usize)>>>);
        impl ByteSource for Watched {
            fn len(&self) -> std::io::Result<u64> {
                Ok(self.0.len() as u64)
            }
            fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
                self.1.lock().unwrap().push((offset, buffer.len()));
                buffer.copy_from_slice(&self.0[offset as usize..offset as usize + buffer.len()]);
                Ok(())
            }
        }
        let (directory, _) = builder(Order::Rows, ExpertNames::default());
        let bytes = std::fs::read(directory.path().join("model.safetensors")).unwrap();
        let reads = Arc::new(Mutex::new(Vec::new()));
        let source = vec![("m".to_string(), Box::new(Watched(bytes, reads.clone())) as Box<dyn ByteSource>)];
        let checkpoint = Arc::new(Checkpoint::from_sources(source).unwrap());
        let stack = checkpoint.entry("mlp.experts.gate_up_proj").unwrap().offset;
        let vb = unstacked_var_builder(checkpoint, ExpertNames::default(), DType::F32, &Device::Cpu);
        reads.lock().unwrap().clear();
        assert!(vb.contains_tensor("mlp.experts.1.up_proj.weight"));
        assert!(reads.lock().unwrap().is_empty());
        vb.get((WIDTH, HIDDEN), "mlp.experts.1.up_proj.weight").unwrap();
        assert_eq!(*reads.lock().unwrap(), [(stack + 3 * 40, 40)]);
    }
}
