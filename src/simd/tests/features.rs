//! That what is detected is what kernels are compiled for, and that detection says what the system says.

/// Outside the one macro that does both, no list of features can be written, so that none can differ from another.
#[cfg(not(miri))] // It interprets every comparison of a letter.
#[test]
fn features_are_named_in_one_place() {
    let sources = [
        include_str!("../avx2.rs"),
        include_str!("../avx512.rs"),
        include_str!("../neon.rs"),
        include_str!("../scalar.rs"),
        include_str!("../multiply.rs"),
        include_str!("../score.rs"),
        include_str!("../select.rs"),
        include_str!("../quantized.rs"),
        include_str!("../product/mod.rs"),
        include_str!("../product/bytes/mod.rs"),
        include_str!("../product/bytes/blocks.rs"),
        include_str!("../product/element.rs"),
        include_str!("../product/panels.rs"),
        include_str!("../product/tiles.rs"),
    ];
    for source in sources {
        for word in ["#[target_feature", "detected!(", "#[cfg(target_feature"] {
            assert!(!source.contains(word), "`{word}` outside `features!`: {}", source.lines().next().unwrap_or(""));
        }
    }
    let macros = include_str!("../mod.rs");
    for word in ["#[target_feature(", "std::arch::$detected!("] {
        assert_eq!(macros.matches(word).count(), 1, "{word}");
    }
}

/// Linux's own list of the CPU's features, asked for each feature of each set.
#[cfg(all(target_os = "linux", target_arch = "x86_64", not(miri)))]
#[test]
fn detection_agrees_with_the_system() {
    use crate::simd::avx2::{self, Avx2};
    use crate::simd::avx512::{self, Avx512};

    let Ok(info) = std::fs::read_to_string("/proc/cpuinfo") else { return };
    let Some(flags) = info.lines().find(|line| line.starts_with("flags")) else { return };
    let flags: Vec<&str> = flags.split_whitespace().collect();
    let has = |features: &[&str]| {
        features.iter().all(|&feature| {
            // Where Linux has another name.
            let name = match feature {
                "avx512bf16" => "avx512_bf16",
                "avx512vnni" => "avx512_vnni",
                "lzcnt" => "abm",
                name => name,
            };
            flags.contains(&name)
        })
    };
    assert_eq!(Avx2::new().is_some(), has(avx2::set::FEATURES));
    assert_eq!(Avx512::<false>::new().is_some(), has(avx512::plain::FEATURES));
    assert_eq!(Avx512::<true>::new().is_some(), has(avx512::dots::FEATURES));
    // All that was taken for granted before is asked for.
    for feature in ["avx2", "fma", "f16c", "bmi1", "bmi2", "lzcnt", "popcnt"] {
        assert!(avx512::plain::FEATURES.contains(&feature) && avx512::dots::FEATURES.contains(&feature), "{feature}");
    }
    assert!(avx512::plain::FEATURES.iter().all(|feature| avx512::dots::FEATURES.contains(feature)));
}
