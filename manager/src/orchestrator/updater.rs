//! Renews tasks when a service's spec changes: so many at a time, watching whether they stay up,
//! and pausing, going on or rolling back when too many do not.
//!
//! Where an update stands is read off the tasks themselves, so a new leader needs no memory of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use skep_api::service::{FailureAction, UpdateConfig, UpdateOrder, UpdateState, UpdateStatus};
use skep_api::task::Slot;
use skep_api::{Service, Task, TaskState, Timestamp};

use super::restart::prefill_node;
use super::service_plan::ServicePlan;
use super::{Alarm, Draft, Scene, TaskIds};

/// What the slots look like to an update.
#[derive(Default)]
struct Progress {
    /// Slots with a live task of an older spec and none of the current one.
    dirty: Vec<Slot>,
    /// Slots with a new task that is not up yet, or not for long enough to go on.
    in_flight: usize,
    /// Until when the last new task is watched.
    watched_until: Option<Timestamp>,
    failures: usize,
    slots: usize,
}

/// Carries the update of one service as far as it may go now.
pub(super) fn advance(plan: &mut ServicePlan, scene: &Scene<'_>, ids: TaskIds<'_>, alarm: &mut Alarm) {
    finish_start_first(plan);
    let state = plan.service.update_status.as_ref().map(|status| status.state);
    match state {
        Some(UpdateState::Paused | UpdateState::RollbackPaused) => return,
        Some(UpdateState::Updating | UpdateState::RollbackStarted) => {}
        None | Some(UpdateState::Completed | UpdateState::RollbackCompleted) => {
            if !plan.drafts.iter().any(|draft| draft.is_live() && plan.is_dirty(&draft.task)) {
                return;
            }
        }
    }
    let started_at = match &plan.service.update_status {
        Some(status) if status.state.is_in_progress() => status.started_at,
        _ => scene.now,
    };
    let rolling_back = state == Some(UpdateState::RollbackStarted);
    let config = config(&plan.service, rolling_back);
    let progress = measure(plan, scene, &config, started_at, alarm);
    if too_many_failures(&progress, &config) && fail(plan, scene, &config, rolling_back) {
        return;
    }
    if progress.dirty.is_empty() && progress.in_flight == 0 {
        complete(plan, scene, &progress, rolling_back, alarm);
        return;
    }
    let room = match config.parallelism {
        0 => usize::MAX,
        limit => usize::try_from(limit).unwrap_or(usize::MAX).saturating_sub(progress.in_flight),
    };
    for &slot in progress.dirty.iter().take(room) {
        renew(plan, scene, slot, config.order, ids);
    }
}

fn config(service: &Service, rolling_back: bool) -> UpdateConfig {
    let config = if rolling_back { &service.spec.rollback_config } else { &service.spec.update_config };
    config.clone().unwrap_or(UpdateConfig::ABSENT)
}

fn monitor(config: &UpdateConfig) -> Duration {
    config.monitor.unwrap_or(UpdateConfig::MONITOR_DEFAULT).duration()
}

fn measure(
    plan: &ServicePlan,
    scene: &Scene<'_>,
    config: &UpdateConfig,
    started_at: Timestamp,
    alarm: &mut Alarm,
) -> Progress {
    let mut slots: BTreeMap<Slot, Vec<&Task>> = BTreeMap::new();
    for draft in plan.drafts.iter().filter(|draft| draft.task.desired_state < TaskState::Remove) {
        slots.entry(draft.task.slot).or_default().push(&draft.task);
    }
    let mut progress = Progress { slots: slots.len(), ..Progress::default() };
    let mut failed: BTreeSet<Slot> = BTreeSet::new();
    for (slot, tasks) in slots {
        let live = tasks.iter().filter(|task| task.is_runnable());
        let (old, new): (Vec<&&Task>, Vec<&&Task>) = live.partition(|task| plan.is_dirty(task));
        let of_update = |task: &&Task| !plan.is_dirty(task) && task.meta.created_at >= started_at;
        if tasks.iter().any(|task| of_update(task) && has_failed(task, monitor(config))) {
            failed.insert(slot);
        }
        match (old.is_empty(), new.iter().rev().find(|task| of_update(task))) {
            (false, None) if new.is_empty() => progress.dirty.push(slot),
            (_, Some(newest)) => match newest.running_since {
                None => progress.in_flight += 1,
                Some(since) => {
                    let settled = since.plus(config.delay.duration());
                    if scene.now < settled {
                        progress.in_flight += 1;
                        alarm.at(settled);
                    }
                    let until = since.plus(monitor(config));
                    progress.watched_until = progress.watched_until.max(Some(until));
                }
            },
            _ => {}
        }
    }
    progress.failures = failed.len();
    progress
}

/// A task of the update that ended by itself before, or soon after, it ran.
fn has_failed(task: &Task, monitor: Duration) -> bool {
    let ended = matches!(task.status.state, TaskState::Failed | TaskState::Rejected | TaskState::Complete);
    ended && task.running_since.is_none_or(|since| task.status.timestamp.since(since) <= monitor)
}

fn too_many_failures(progress: &Progress, config: &UpdateConfig) -> bool {
    #[expect(clippy::cast_precision_loss, reason = "a ratio of small counts")]
    let ratio = progress.failures as f32 / progress.slots.max(1) as f32;
    ratio > config.max_failure_ratio
}

/// Acts on too many failures; says whether the update stops here.
fn fail(plan: &mut ServicePlan, scene: &Scene<'_>, config: &UpdateConfig, rolling_back: bool) -> bool {
    let why = "too many tasks failed";
    match (config.failure_action, rolling_back) {
        (FailureAction::Continue, _) => false,
        (FailureAction::Rollback, false) if plan.service.previous_spec.is_some() => {
            roll_back(Arc::make_mut(&mut plan.service), scene.now, &format!("update rolled back: {why}"));
            true
        }
        (_, true) => {
            set_status(plan, scene, UpdateState::RollbackPaused, &format!("rollback paused: {why}"));
            true
        }
        (FailureAction::Pause | FailureAction::Rollback, false) => {
            set_status(plan, scene, UpdateState::Paused, &format!("update paused: {why}"));
            true
        }
    }
}

/// Puts the previous spec in force and starts a rollback to it.
pub(crate) fn roll_back(service: &mut Service, now: Timestamp, message: &str) {
    if let Some(previous) = service.previous_spec.take() {
        service.previous_spec = Some(std::mem::replace(&mut service.spec, previous));
        service.update_status = Some(UpdateStatus {
            state: UpdateState::RollbackStarted,
            started_at: now,
            completed_at: None,
            message: message.to_owned(),
        });
    }
}

fn set_status(plan: &mut ServicePlan, scene: &Scene<'_>, state: UpdateState, message: &str) {
    let started_at = plan.service.update_status.as_ref().map_or(scene.now, |status| status.started_at);
    let completed_at = (!state.is_in_progress()).then_some(scene.now);
    Arc::make_mut(&mut plan.service).update_status =
        Some(UpdateStatus { state, started_at, completed_at, message: message.to_owned() });
}

fn complete(plan: &mut ServicePlan, scene: &Scene<'_>, progress: &Progress, rolling_back: bool, alarm: &mut Alarm) {
    if let Some(until) = progress.watched_until.filter(|&until| scene.now < until) {
        alarm.at(until);
        return;
    }
    if plan.service.update_status.is_none() {
        return;
    }
    if rolling_back {
        set_status(plan, scene, UpdateState::RollbackCompleted, "rollback completed");
    } else {
        set_status(plan, scene, UpdateState::Completed, "update completed");
    }
}

/// Replaces the task of one slot.
fn renew(plan: &mut ServicePlan, scene: &Scene<'_>, slot: Slot, order: UpdateOrder, ids: TaskIds<'_>) {
    let desired = match order {
        UpdateOrder::StopFirst => {
            for draft in plan.drafts.iter_mut().filter(|draft| draft.task.slot == slot && draft.is_live()) {
                draft.desire(TaskState::Shutdown);
            }
            // Prepared while the old one stops; runs when that is gone.
            TaskState::Ready
        }
        UpdateOrder::StartFirst => TaskState::Running,
    };
    let mut draft = plan.new_task(scene, slot, desired, ids);
    prefill_node(&mut draft.task, slot);
    plan.drafts.push(draft);
}

/// The old task of a slot goes once the new one runs.
fn finish_start_first(plan: &mut ServicePlan) {
    let runs = |draft: &&Draft| draft.is_live() && draft.task.status.state == TaskState::Running;
    let current = plan.drafts.iter().filter(runs).filter(|draft| !plan.is_dirty(&draft.task));
    let renewed: BTreeSet<Slot> = current.map(|draft| draft.task.slot).collect();
    let is_old = |draft: &Draft| draft.is_live() && renewed.contains(&draft.task.slot) && plan.is_dirty(&draft.task);
    let old: Vec<bool> = plan.drafts.iter().map(is_old).collect();
    for (draft, _) in plan.drafts.iter_mut().zip(old).filter(|(_, old)| *old) {
        draft.desire(TaskState::Shutdown);
    }
}
