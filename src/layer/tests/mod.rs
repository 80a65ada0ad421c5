//! The layer from inside.

mod expert_kinds;

use candle_core::{DType, Device, Tensor};

use crate::{
    Assignment, Error, Expert, Gate, MoeLayer, MoeSpec, Result, RouteContext, RouteRequest, RouteState, Router, Scratch,
};

/// Answers for a token more than it was asked for.
struct OneTooMany;

impl Router for OneTooMany {
    fn name(&self) -> &'static str {
        "one-too-many"
    }

    fn route_into(
        &self,
        request: &RouteRequest<'_>,
        _: &mut RouteState,
        _: &mut Scratch,
        assignment: &mut Assignment,
    ) -> Result<()> {
        let tokens = request.scores().tokens() + 1;
        let (ids, weights) = (vec![0; tokens], vec![0.5; tokens]);
        *assignment = Assignment::from_parts(request.scores().experts(), 1, &ids, &weights)?;
        Ok(())
    }
}

/// What the router says of a batch that is only looked ahead to is checked as any answer is.
#[test]
fn a_guess_refuses_a_wrong_answer() {
    let zeros = |rows: usize, columns: usize| Tensor::zeros((rows, columns), DType::F32, &Device::Cpu).unwrap();
    let held = vec![Expert::new(zeros(4, 4), zeros(4, 4), zeros(4, 4)); 3];
    let layer = MoeLayer::new(MoeSpec::new(4, 3, 1, 4).unwrap(), Gate::new(zeros(3, 4)), held, None).unwrap();
    let guess = |layer: &MoeLayer| {
        layer.guess(&zeros(2, 4), RouteContext::default(), layer.spec().top_k, &RouteState::default())
    };
    assert_eq!(guess(&layer).unwrap().len(), 1);
    let error = guess(&layer.with_router(std::sync::Arc::new(OneTooMany))).unwrap_err();
    assert!(matches!(error, Error::Answer(_)), "{error}");
}
