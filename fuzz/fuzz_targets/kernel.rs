//! Raw degrees, bit matrices and permutations: an error, or columns that are in range and distinct.

#![no_main]

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use phase_moe::routing::{PhaseKernel, PhaseSide, permutations, phase_ring};

fn side(bytes: &mut Unstructured<'_>, rows: usize, seed: u64) -> Result<Option<PhaseSide>> {
    let [mut order, _] = permutations(rows as u32, seed);
    if bytes.ratio(1, 16)? && rows > 0 {
        order[bytes.arbitrary::<usize>()? % rows] = bytes.arbitrary()?;
    }
    let side = if bytes.arbitrary()? {
        let words = rows.div_ceil(64);
        let mut bits = Vec::new();
        for _ in 0..rows * words {
            bits.push(bytes.arbitrary::<u64>()?);
        }
        if bytes.ratio(7, 8)? && !rows.is_multiple_of(64) {
            bits.chunks_exact_mut(words.max(1)).for_each(|row| row[words - 1] &= (1 << (rows % 64)) - 1);
        }
        PhaseSide::from_bits(&bits, order)
    } else {
        let degrees: Result<Vec<u32>> =
            (0..rows).map(|_| Ok(u32::from(bytes.arbitrary::<u16>()?) % (rows as u32 + 2))).collect();
        PhaseSide::new(degrees?, order)
    };
    Ok(side.ok())
}

/// Distinct columns below `columns`, −1 only at the end.
fn check(chosen: &[i32], top_k: usize, columns: usize) {
    for row in chosen.chunks_exact(top_k) {
        let filled = row.iter().take_while(|&&column| column >= 0).count();
        assert!(row[filled..].iter().all(|&column| column == -1), "{row:?}");
        for (at, &column) in row[..filled].iter().enumerate() {
            assert!((column as usize) < columns && !row[..at].contains(&column), "{row:?}");
        }
    }
}

fn run(bytes: &mut Unstructured<'_>) -> Result<()> {
    let (rows, top_k, seed): (usize, usize, u64) =
        (bytes.int_in_range(0..=130)?, bytes.int_in_range(0..=140)?, bytes.arbitrary()?);
    let (sources, targets) = (side(bytes, rows, seed)?, side(bytes, rows, seed ^ 1)?);
    if let (Some(sources), Some(targets)) = (sources, targets) {
        let routed = phase_ring(sources, targets, top_k, seed);
        assert_eq!(routed.is_ok(), top_k > 0);
        if let Ok(chosen) = routed {
            assert_eq!(chosen.len(), rows * top_k);
            check(&chosen, top_k, rows);
        }
    }
    let experts: usize = bytes.int_in_range(0..=20)?;
    let shares: Result<Vec<f64>> = (0..experts).map(|_| Ok(f64::from_bits(bytes.arbitrary()?))).collect();
    let shares = shares?;
    let density = f64::from_bits(bytes.arbitrary()?);
    if let Ok(kernel) = PhaseKernel::new(density, bytes.int_in_range(0..=9)?, seed)
        && let Ok(chosen) = kernel.select(rows, &shares, top_k)
    {
        assert_eq!(chosen.len(), rows * top_k);
        check(&chosen, top_k, experts);
    }
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    let _ = run(&mut Unstructured::new(data));
});
