//! Histograms that count and nothing more.
//!
//! openraft records the sizes of its batches in `base2histogram`, which makes lookup tables for all
//! of its sixteen scales at the first use: 25 MB in each manager. Nobody here reads those figures;
//! what openraft names of the crate stands here in its place (`[patch.crates-io]` in the workspace's
//! `Cargo.toml`, ADR 10).

use std::marker::PhantomData;

/// Takes values and keeps their number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram<T = ()> {
    samples: u64,
    slots: PhantomData<T>,
}

impl<T> Histogram<T> {
    #[must_use]
    pub const fn new() -> Self {
        Self { samples: 0, slots: PhantomData }
    }

    pub const fn record(&mut self, _value: u64) {
        self.samples += 1;
    }

    pub const fn record_n(&mut self, _value: u64, count: u64) {
        self.samples += count;
    }

    /// The number of values; of their sizes nothing is known.
    #[must_use]
    pub fn percentile_stats(&self) -> PercentileStats {
        PercentileStats { samples: self.samples, ..PercentileStats::default() }
    }
}

impl<T> Default for Histogram<T> {
    fn default() -> Self {
        Self::new()
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PercentileStats {
    pub samples: u64,
    pub p0_1: u64,
    pub p1: u64,
    pub p5: u64,
    pub p10: u64,
    pub p50: u64,
    pub p90: u64,
    pub p99: u64,
    pub p99_9: u64,
}

/// A chart of nothing.
#[derive(Clone, Debug, Default)]
pub struct AsciiChart;

impl AsciiChart {
    #[must_use]
    pub const fn new() -> Self {
        Self
    }

    #[must_use]
    pub fn add(self, _name: &str, _histogram: Histogram) -> Self {
        self
    }

    #[must_use]
    pub const fn compact(&self) -> &'static str {
        ""
    }

    #[must_use]
    pub const fn detailed(&self) -> &'static str {
        ""
    }
}

impl std::fmt::Display for PercentileStats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} values", self.samples)
    }
}
