//! Balance figures under unequal shares against their definitions (`balance/make_table.py`), and under equal ones against the
//! formulas on loads alone, to the last bit.

use std::path::Path;

use crate::routing::Balance;
use serde_json::Value;

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

fn loads(values: &[f64]) -> Vec<u32> {
    values.iter().map(|&load| load as u32).collect()
}

#[test]
fn figures_are_those_of_the_definitions() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/balance/table.json");
    let table: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let rows = table.as_array().unwrap();
    assert!(rows.len() >= 18);
    for row in rows {
        let (name, loads, shares) = (&row["name"], loads(&numbers(&row["loads"])), numbers(&row["shares"]));
        let demand = loads.iter().map(|&load| u64::from(load)).sum();
        // Shares have no scale of their own.
        for scale in [1.0, 1e-30, 3.7, 1e30] {
            let shares: Vec<f64> = shares.iter().map(|share| share * scale).collect();
            let got = Balance::new(&loads, &shares, demand);
            let near = |got: f64, wanted: &Value, figure: &str| {
                let wanted = wanted.as_f64().unwrap_or(f64::INFINITY);
                let right = got == wanted || (got - wanted).abs() <= 2e-9 * (1.0 + wanted.abs());
                assert!(right, "{name}, {figure}: {got}, not {wanted}, shares times {scale}");
            };
            near(got.cv, &row["cv"], "cv");
            near(got.gini, &row["gini"], "gini");
            near(got.jain, &row["jain"], "jain");
            near(got.max_violation, &row["max_violation"], "max_violation");
        }
    }
}

#[test]
fn a_perfect_split_is_perfect_in_every_figure() {
    for (loads, shares) in
        [(&[20, 40][..], &[1.0, 2.0][..]), (&[7, 13, 40], &[7.0, 13.0, 40.0]), (&[0, 5], &[0.0, 3.0])]
    {
        let demand = loads.iter().map(|&load| u64::from(load)).sum();
        let got = Balance::new(loads, shares, demand);
        assert_eq!(got, Balance { max_violation: 0.0, cv: 0.0, gini: 0.0, jain: 1.0 }, "{loads:?}");
    }
}

/// The figures of loads alone, as they were before shares counted.
fn of_loads(loads: &[u32]) -> [f64; 3] {
    let total: f64 = loads.iter().map(|&load| f64::from(load)).sum();
    let (count, squares) = (loads.len() as f64, loads.iter().map(|&load| f64::from(load).powi(2)).sum::<f64>());
    let mean = total / count;
    let mut sorted = loads.to_vec();
    sorted.sort_unstable();
    let ranked: f64 = sorted.iter().zip(1..).map(|(&load, rank)| f64::from(load) * f64::from(rank)).sum();
    [
        (squares / count - mean * mean).max(0.0).sqrt() / mean,
        (2.0 * ranked / (count * total) - (count + 1.0) / count).max(0.0),
        total * total / (count * squares),
    ]
}

#[test]
fn equal_shares_give_the_same_bits_as_loads_alone() {
    let mut seed = 9u64;
    let mut draw = |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) % below
    };
    for round in 0..2000 {
        let count = 1 + draw(64) as usize;
        let most = [4, 100, 5000, u64::from(u32::MAX)][round % 4];
        let loads: Vec<u32> = (0..count).map(|_| draw(most) as u32).collect();
        if loads.iter().all(|&load| load == 0) {
            continue;
        }
        for share in [1.0, 0.1, 12.5, 1.0 / 3.0] {
            let got = Balance::new(&loads, &vec![share; count], 100);
            let bits = [got.cv, got.gini, got.jain].map(f64::to_bits);
            assert_eq!(bits, of_loads(&loads).map(f64::to_bits), "{loads:?}");
        }
    }
}
