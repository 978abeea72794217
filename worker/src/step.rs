//! What a worker does next with a task.

use skep_api::TaskState;

/// The next thing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Accept,
    /// Get the image, make the container.
    Prepare,
    /// It is ready; the manager has not asked for more yet.
    AwaitStart,
    Start,
    /// It runs: wait for its end, or for another wish.
    Watch,
    /// It is not wanted any more.
    Stop,
}

/// The step from what is observed towards what is desired; `None` once nothing is left. Observed
/// state only ever moves down its list.
#[must_use]
pub fn next_step(observed: TaskState, desired: TaskState) -> Option<Step> {
    use TaskState as S;
    match observed {
        S::Complete | S::Shutdown | S::Failed | S::Rejected | S::Remove | S::Orphaned => None,
        _ if !desired.is_wanted() => Some(Step::Stop),
        S::New | S::Pending | S::Assigned => Some(Step::Accept),
        S::Accepted | S::Preparing => Some(Step::Prepare),
        S::Ready if desired < S::Running => Some(Step::AwaitStart),
        S::Ready | S::Starting => Some(Step::Start),
        S::Running => Some(Step::Watch),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_goes_down_its_states_and_stops_when_unwanted() {
        use TaskState as S;
        for (observed, desired, want) in [
            (S::Assigned, S::Running, Some(Step::Accept)),
            (S::Accepted, S::Ready, Some(Step::Prepare)),
            (S::Ready, S::Ready, Some(Step::AwaitStart)),
            (S::Ready, S::Running, Some(Step::Start)),
            (S::Starting, S::Running, Some(Step::Start)),
            (S::Running, S::Running, Some(Step::Watch)),
            (S::Running, S::Shutdown, Some(Step::Stop)),
            (S::Preparing, S::Remove, Some(Step::Stop)),
            (S::Failed, S::Shutdown, None),
            (S::Complete, S::Running, None),
            (S::Ready, S::Complete, Some(Step::Start)),
            (S::Running, S::Complete, Some(Step::Watch)),
            (S::Complete, S::Complete, None),
        ] {
            assert_eq!(next_step(observed, desired), want, "{observed:?} towards {desired:?}");
        }
    }
}
