//! Decides whether and when a container that has ended is started again. Holds no clock.

use std::time::Duration;

use crate::container::config::RestartPolicy;

const DELAY_MIN: Duration = Duration::from_millis(100);
const DELAY_MAX: Duration = Duration::from_secs(60);
/// A container that ran this long has not failed to start.
const SETTLED: Duration = Duration::from_secs(10);

/// One container's restarts.
#[derive(Clone, Debug)]
pub(crate) struct RestartBackoff {
    delay: Duration,
    failures: u32,
}

impl Default for RestartBackoff {
    fn default() -> Self {
        Self { delay: DELAY_MIN, failures: 0 }
    }
}

impl RestartBackoff {
    /// Says after how long a container that ended with `code` after `ran` is started again, if at all.
    pub(crate) fn handle_exit(&mut self, policy: RestartPolicy, code: i32, ran: Duration) -> Option<Duration> {
        if ran >= SETTLED {
            *self = Self::default();
        }
        let again = match policy {
            RestartPolicy::No => false,
            RestartPolicy::Always | RestartPolicy::UnlessStopped => true,
            RestartPolicy::OnFailure { retries_max } => code != 0 && (retries_max == 0 || self.failures < retries_max),
        };
        self.failures += 1;
        let delay = self.delay;
        self.delay = (self.delay * 2).min(DELAY_MAX);
        again.then_some(delay)
    }
}

/// Whether a daemon that starts also starts a container that it finds ended.
pub(crate) fn starts_with_daemon(policy: RestartPolicy, stopped_by_hand: bool) -> bool {
    match policy {
        RestartPolicy::No | RestartPolicy::OnFailure { .. } => false,
        RestartPolicy::Always => true,
        RestartPolicy::UnlessStopped => !stopped_by_hand,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(1);

    #[test]
    fn delays_double_up_to_a_minute_and_a_long_run_forgets_them() {
        let mut backoff = RestartBackoff::default();
        let mut next = |ran| backoff.handle_exit(RestartPolicy::Always, 0, ran).unwrap();
        let first: Vec<_> = (0..4).map(|_| next(SOON).as_millis()).collect();
        assert_eq!(first, [100, 200, 400, 800]);
        for _ in 0..10 {
            next(SOON);
        }
        assert_eq!(next(SOON), DELAY_MAX);
        assert_eq!(next(SETTLED), DELAY_MIN);
    }

    #[test]
    fn failures_are_counted_and_success_is_no_failure() {
        let policy = RestartPolicy::OnFailure { retries_max: 2 };
        let mut backoff = RestartBackoff::default();
        assert!(backoff.handle_exit(policy, 0, SOON).is_none());
        let mut backoff = RestartBackoff::default();
        let again: Vec<_> = (0..3).map(|_| backoff.handle_exit(policy, 1, SOON).is_some()).collect();
        assert_eq!(again, [true, true, false]);
        assert!(RestartBackoff::default().handle_exit(RestartPolicy::No, 1, SOON).is_none());
    }

    #[test]
    fn what_was_stopped_by_hand_comes_back_with_the_daemon_only_if_always_is_meant() {
        assert!(starts_with_daemon(RestartPolicy::Always, true));
        assert!(!starts_with_daemon(RestartPolicy::UnlessStopped, true));
        assert!(starts_with_daemon(RestartPolicy::UnlessStopped, false));
        assert!(!starts_with_daemon(RestartPolicy::No, false));
    }
}
