//! Rules with raw floats, placements with raw devices: an error, or limits that say what the rule says.

#![no_main]

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use phase_moe::{Capacity, CapacityRule, Placement};
use phase_moe::routing::{Profile, Rounding, Shares};

fn float(bytes: &mut Unstructured<'_>) -> Result<f64> {
    let tag: u8 = bytes.arbitrary()?;
    Ok(if tag < 192 { f64::from(tag) / 64.0 } else { f64::from_bits(bytes.arbitrary()?) })
}

fn check(capacity: &Capacity, experts: usize) {
    let pools = capacity.limits().map_or(experts, <[u32]>::len);
    assert!((0..experts).all(|expert| capacity.pool_of(expert as u16) < pools));
}

fn run(bytes: &mut Unstructured<'_>) -> Result<()> {
    let (tokens, top_k): (usize, usize) = (bytes.arbitrary::<u16>()?.into(), bytes.int_in_range(0..=70)?);
    let experts: usize =
        if bytes.ratio(1, 64)? { bytes.arbitrary::<u16>()?.into() } else { bytes.int_in_range(0..=70)? };
    let shares = match bytes.int_in_range(0..=3)? {
        kind @ 0..=1 => {
            let speeds: Result<Vec<f64>> = (0..bytes.int_in_range(0..=12)?).map(|_| float(bytes)).collect();
            let speeds = speeds?;
            if kind == 0 { Shares::PerDevice { speeds } } else { Shares::EqualGroups { speeds } }
        }
        _ => Shares::PerExpert { profile: *bytes.choose(&[Profile::Uniform, Profile::Mild, Profile::Strong, Profile::Extreme])?, seed: bytes.arbitrary()? },
    };
    let rounding = if bytes.arbitrary()? { Rounding::Exact } else { Rounding::Ceil };
    let rule = CapacityRule::new(float(bytes)?, shares).with_rounding(rounding).with_minimum_mean(float(bytes)?);
    let capacity = rule.capacity(tokens, experts, top_k);
    if !(rule.factor.is_finite() && rule.factor > 0.0 && rule.minimum_mean >= 0.0) {
        assert!(capacity.is_err());
    }
    if let Ok(capacity) = capacity {
        check(&capacity, experts);
        if let (Rounding::Exact, Some(limits)) = (rounding, capacity.limits()) {
            let total: f64 = limits.iter().map(|&limit| f64::from(limit)).sum();
            assert!(total <= tokens as f64 * top_k as f64 * rule.factor + 1e-5, "{total} {rule:?}");
        }
    }
    let devices = bytes.arbitrary::<u16>()?.into();
    let device_of: Result<Vec<u16>> = (0..experts.min(200)).map(|_| Ok(bytes.arbitrary::<u16>()? % 300)).collect();
    if let Ok(placement) = Placement::new(device_of?, devices) {
        let limits: Result<Vec<u32>> = (0..devices.min(400)).map(|_| bytes.arbitrary()).collect();
        if let Ok(capacity) = Capacity::per_device(placement, limits?) {
            check(&capacity, experts.min(200));
        }
    }
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    let _ = run(&mut Unstructured::new(data));
});
