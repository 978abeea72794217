//! Decides a container's health from the results of its check. Holds no clock.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::container::config::HealthCheck;

/// What is known of a container's health.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HealthStatus {
    /// It has no check.
    #[default]
    None,
    Starting,
    Healthy,
    Unhealthy,
}

impl HealthStatus {
    /// The Engine API's word.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Starting => "starting",
            Self::Healthy => "healthy",
            Self::Unhealthy => "unhealthy",
        }
    }
}

/// One container's health, probe by probe.
#[derive(Debug)]
pub(crate) struct HealthMonitor {
    check: HealthCheck,
    started: Instant,
    failures: u32,
    status: HealthStatus,
}

impl HealthMonitor {
    pub(crate) fn new(check: HealthCheck, status: HealthStatus, now: Instant) -> Self {
        Self { check, started: now, failures: 0, status }
    }

    pub(crate) fn status(&self) -> HealthStatus {
        self.status
    }

    /// Probes that failed since the last that passed.
    pub(crate) fn failures(&self) -> u32 {
        self.failures
    }

    /// How long to wait before the next probe: short while the container starts.
    pub(crate) fn pause(&self, now: Instant) -> Duration {
        let starting = self.status == HealthStatus::Starting && now < self.started + self.check.start_period;
        if starting { self.check.start_interval.min(self.check.interval) } else { self.check.interval }
    }

    /// Takes a probe's result. Failures within the start period do not count.
    pub(crate) fn handle_result(&mut self, passed: bool, now: Instant) {
        if passed {
            self.failures = 0;
            self.status = HealthStatus::Healthy;
            return;
        }
        let starting = self.status == HealthStatus::Starting && now < self.started + self.check.start_period;
        if starting {
            return;
        }
        self.failures += 1;
        if self.failures >= self.check.retries {
            self.status = HealthStatus::Unhealthy;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(start_period: u64, results: &[(u64, bool)], want: HealthStatus) {
        let seconds = Duration::from_secs;
        let check = HealthCheck {
            command: vec![],
            interval: seconds(30),
            timeout: seconds(30),
            retries: 3,
            start_period: seconds(start_period),
            start_interval: seconds(5),
        };
        let now = Instant::now();
        let mut monitor = HealthMonitor::new(check, HealthStatus::Starting, now);
        for &(at, passed) in results {
            monitor.handle_result(passed, now + seconds(at));
        }
        assert_eq!(monitor.status(), want);
    }

    #[test]
    fn three_failures_in_a_row_are_unhealthy_and_one_pass_heals() {
        check(0, &[(1, false), (2, false)], HealthStatus::Starting);
        check(0, &[(1, false), (2, false), (3, false)], HealthStatus::Unhealthy);
        check(0, &[(1, false), (2, false), (3, true), (4, false)], HealthStatus::Healthy);
        check(0, &[(1, false), (2, false), (3, false), (4, true)], HealthStatus::Healthy);
    }

    #[test]
    fn failures_while_it_starts_do_not_count() {
        check(10, &[(1, false), (2, false), (3, false), (4, false)], HealthStatus::Starting);
        check(10, &[(1, false), (11, false), (12, false)], HealthStatus::Starting);
        check(10, &[(1, true), (2, false), (3, false), (4, false)], HealthStatus::Unhealthy);
    }
}
