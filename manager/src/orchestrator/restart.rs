//! When a slot whose task ended is filled again.
//!
//! The replacement is made at once and prepared on its node (desired READY), and may run once the
//! delay has passed and nothing of the slot runs any more. A slot that fails again and again waits
//! longer each time, unlike in Swarm, where it is tried every five seconds for ever.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use skep_api::task::{RestartCondition, Slot};
use skep_api::{Task, TaskState, Timestamp};

use super::service_plan::ServicePlan;
use super::{Alarm, Edit, Scene, TaskIds};

const DELAY: Duration = Duration::from_secs(5);
/// The delay doubles with each failure beyond this many, up to the limit.
const PATIENT_FAILURES: usize = 2;
const DELAY_MAX: Duration = Duration::from_secs(120);
/// Tasks made for a service in one look: what a look holds in memory stays bounded.
const MADE_AT_ONCE: usize = 5000;

/// Makes a task for every wanted slot that has none; for more than [`MADE_AT_ONCE`], in the next looks.
pub(super) fn refill(
    plan: &mut ServicePlan,
    scene: &Scene<'_>,
    wanted: &BTreeSet<Slot>,
    ids: TaskIds<'_>,
    alarm: &mut Alarm,
) {
    for draft in &mut plan.drafts {
        // What ended by itself is not wanted back: its slot is, unless it did its part of a job.
        let task = &draft.task;
        if task.status.state.is_terminal() && task.desired_state.is_wanted() && !task.is_done() {
            draft.desire(TaskState::Shutdown);
        }
    }
    let filled: BTreeSet<Slot> = plan.drafts.iter().filter(|d| d.is_live()).map(|d| d.task.slot).collect();
    let kept = plan.drafts.iter().filter(|draft| draft.task.desired_state < TaskState::Remove);
    let newest: BTreeMap<Slot, &Task> = kept.map(|draft| (draft.task.slot, &*draft.task)).collect();
    let unended = plan.drafts.iter().filter(|draft| is_in_the_way(scene, &draft.task));
    let occupied: BTreeSet<Slot> = unended.map(|draft| draft.task.slot).collect();
    let made = wanted.difference(&filled).filter_map(|&slot| {
        let desired = match newest.get(&slot) {
            // What an update of a job left running is given the time to end.
            None if plan.is_job() && occupied.contains(&slot) => TaskState::Ready,
            None => plan.goal(),
            Some(newest) if !may_restart(plan, scene, newest, alarm) => return None,
            Some(_) => TaskState::Ready,
        };
        let mut draft = plan.new_task(scene, slot, desired, ids);
        prefill_node(&mut draft.task, slot);
        Some(draft)
    });
    let made: Vec<_> = made.take(plan.room().min(MADE_AT_ONCE)).collect();
    plan.drafts.extend(made);
}

/// A global service's task belongs to its node from the start.
pub(super) fn prefill_node(task: &mut std::sync::Arc<Task>, slot: Slot) {
    if let Slot::Node(node) = slot {
        std::sync::Arc::make_mut(task).node_id = Some(node);
    }
}

/// Whether a task may still run on its node, so that no other of its slot may.
fn is_in_the_way(scene: &Scene<'_>, task: &Task) -> bool {
    !task.status.state.is_terminal()
        && task.status.state >= TaskState::Assigned
        && task.node_id.is_some_and(|node| !scene.is_lost(node))
}

fn may_restart(plan: &ServicePlan, scene: &Scene<'_>, ended: &Task, alarm: &mut Alarm) -> bool {
    let state = ended.status.state;
    let by_itself = matches!(state, TaskState::Complete | TaskState::Failed | TaskState::Rejected);
    if !by_itself || plan.is_dirty(ended) {
        return true;
    }
    let policy = plan.service.spec.task_template.restart_policy.clone().unwrap_or_default();
    match policy.condition {
        RestartCondition::None => return false,
        RestartCondition::Any | RestartCondition::OnFailure if ended.is_done() => return false,
        RestartCondition::OnFailure if state == TaskState::Complete => return false,
        RestartCondition::OnFailure | RestartCondition::Any => {}
    }
    let Some(attempts) = policy.max_attempts.filter(|&attempts| attempts > 0) else { return true };
    let window = policy.window.filter(|window| !window.is_zero()).map(skep_api::units::Nanos::duration);
    let recent = failures(plan, ended.slot).filter(|&at| window.is_none_or(|window| scene.now.since(at) <= window));
    let recent: Vec<Timestamp> = recent.collect();
    // The first run is no restart.
    let allowed = (recent.len() as u64) <= attempts;
    if !allowed && let (Some(window), Some(&oldest)) = (window, recent.iter().min()) {
        alarm.at(oldest.plus(window));
    }
    allowed
}

/// When runs of the current spec in `slot` ended by themselves.
fn failures(plan: &ServicePlan, slot: Slot) -> impl Iterator<Item = Timestamp> + '_ {
    plan.drafts
        .iter()
        .filter(move |draft| draft.task.slot == slot && !plan.is_dirty(&draft.task))
        .filter(|draft| {
            matches!(draft.task.status.state, TaskState::Complete | TaskState::Failed | TaskState::Rejected)
        })
        .map(|draft| draft.task.status.timestamp)
}

/// Lets replacements run whose time has come.
pub(super) fn promote(plan: &mut ServicePlan, scene: &Scene<'_>, alarm: &mut Alarm) {
    for index in 0..plan.drafts.len() {
        let draft = &plan.drafts[index];
        if draft.edit == Edit::Delete || draft.task.desired_state != TaskState::Ready || !draft.is_live() {
            continue;
        }
        let slot = draft.task.slot;
        let due = draft.task.meta.created_at.plus(delay(plan, scene, slot));
        if scene.now < due {
            alarm.at(due);
            continue;
        }
        let occupied = plan
            .drafts
            .iter()
            .enumerate()
            .any(|(other, draft)| other != index && draft.task.slot == slot && is_in_the_way(scene, &draft.task));
        if !occupied {
            let goal = plan.goal();
            plan.drafts[index].desire(goal);
        }
    }
}

/// How long a replacement in `slot` waits: not at all if its predecessor was told to go.
fn delay(plan: &ServicePlan, scene: &Scene<'_>, slot: Slot) -> Duration {
    let predecessor = plan.drafts.iter().rev().find(|draft| draft.task.slot == slot && !draft.is_live());
    let by_itself = predecessor.is_some_and(|draft| {
        matches!(draft.task.status.state, TaskState::Complete | TaskState::Failed | TaskState::Rejected)
            && !plan.is_dirty(&draft.task)
            && draft.task.node_id.is_none_or(|node| !scene.gives_up_tasks(node))
    });
    if !by_itself {
        return Duration::ZERO;
    }
    let policy = plan.service.spec.task_template.restart_policy.as_ref();
    let base = policy.and_then(|policy| policy.delay).map_or(DELAY, skep_api::units::Nanos::duration);
    let failed = failures(plan, slot).count();
    let doublings = u32::try_from(failed.saturating_sub(PATIENT_FAILURES)).unwrap_or(0).min(8);
    (base * 2u32.pow(doublings)).min(DELAY_MAX.max(base))
}
