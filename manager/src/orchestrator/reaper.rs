//! Forgets tasks: those to be removed once they are over, and the oldest of a slot's history.

use std::collections::BTreeMap;

use skep_api::TaskState;
use skep_api::task::Slot;

use super::service_plan::ServicePlan;
use super::{Edit, Scene};

pub(super) fn reap(plan: &mut ServicePlan, scene: &Scene<'_>) {
    for draft in &mut plan.drafts {
        let state = draft.task.status.state;
        let lost = draft.task.node_id.is_none_or(|node| scene.is_lost(node));
        let over = state.is_terminal() || state < TaskState::Assigned || lost;
        if draft.task.desired_state == TaskState::Remove && over {
            draft.edit = Edit::Delete;
        }
    }
    if scene.history_limit < 0 {
        return;
    }
    let attempts = plan.service.spec.task_template.restart_policy.as_ref().and_then(|policy| policy.max_attempts);
    // As many as the restart policy counts must be kept, or it could not count them.
    let counted = attempts.map_or(0, |attempts| usize::try_from(attempts).unwrap_or(usize::MAX).saturating_add(1));
    let limit = usize::try_from(scene.history_limit).unwrap_or(0).max(counted).max(1);
    let mut per_slot: BTreeMap<Slot, usize> = BTreeMap::new();
    for draft in plan.drafts.iter_mut().rev().filter(|draft| draft.edit != Edit::Delete) {
        let seen = per_slot.entry(draft.task.slot).or_default();
        *seen += 1;
        let lost = draft.task.node_id.is_none_or(|node| scene.is_lost(node));
        let over = draft.task.status.state.is_terminal() || (lost && draft.task.desired_state > TaskState::Running);
        if *seen > limit && over {
            draft.edit = Edit::Delete;
        }
    }
}
