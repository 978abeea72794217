//! Hands tasks without a node to the scheduler and writes down what it says.

use std::collections::BTreeMap;
use std::sync::Arc;

use skep_api::generic_resource::{self, GenericResource};
use skep_api::task::TaskStatus;
use skep_api::volume::VolumeAttachment;
use skep_api::{NodeId, ServiceId, Task, TaskId, TaskState};
use skep_scheduler::{ClusterView, Group, Occupant, check_node, place as schedule};

use super::{Draft, Edit, Scene};

/// How many recent failures make a node the last choice for a service, and how recent.
const FAILING_COUNT: usize = 5;
const FAILING_WINDOW: std::time::Duration = std::time::Duration::from_secs(300);

/// Where a task goes, and the volumes of the swarm that it has there.
struct Place {
    node: NodeId,
    volumes: Vec<VolumeAttachment>,
}

/// Places all tasks that wait for a node.
pub(super) fn place(scene: &Scene<'_>, drafts: &mut [Draft]) {
    let waits = |draft: &Draft| draft.is_live() && draft.task.status.state == TaskState::Pending;
    if !drafts.iter().any(waits) {
        return;
    }
    let mut view = cluster_view(scene, drafts);
    let mut groups: BTreeMap<(ServiceId, usize), Group> = BTreeMap::new();
    let mut told: BTreeMap<TaskId, Result<Place, String>> = BTreeMap::new();
    for draft in drafts.iter().filter(|draft| waits(draft)) {
        let task = &draft.task;
        match task.node_id {
            Some(node) => {
                let group = Group { occupant: occupant(task), tasks: vec![task.id] };
                let checked = check_node(&view, node, &group);
                let volumes = view.choose_volumes(node, &task.spec).filter(|_| checked.is_ok()).unwrap_or_default();
                if checked.is_ok() {
                    view.add_task(node, &group.occupant);
                    view.take_volumes(node, &task.spec, &volumes);
                }
                told.insert(task.id, checked.map(|()| Place { node, volumes }));
            }
            None => {
                let key = (task.service_id, Arc::as_ptr(&task.spec) as usize);
                let group = groups.entry(key).or_insert_with(|| Group { occupant: occupant(task), tasks: Vec::new() });
                group.tasks.push(task.id);
            }
        }
    }
    let groups: Vec<Group> = groups.into_values().collect();
    let mut plan = schedule(&mut view, &groups);
    for (task, node) in plan.placements {
        told.insert(task, Ok(Place { node, volumes: plan.volumes.remove(&task).unwrap_or_default() }));
    }
    for refusal in plan.refusals {
        told.extend(refusal.tasks.into_iter().map(|task| (task, Err(refusal.reason.clone()))));
    }
    for draft in drafts.iter_mut() {
        if let Some(decision) = told.remove(&draft.task.id) {
            write_decision(scene, draft, decision);
        }
    }
    assign_resources(scene, drafts);
}

/// Gives tasks that just got a node what they reserve of its generic resources.
fn assign_resources(scene: &Scene<'_>, drafts: &mut [Draft]) {
    let waits = |task: &Task| {
        let reserved = task.spec.resources.reservations.as_ref().is_some_and(|reserved| !reserved.generic.is_empty());
        reserved && task.assigned.is_empty() && task.status.state == TaskState::Assigned
    };
    if !drafts.iter().any(|draft| waits(&draft.task)) {
        return;
    }
    let mut taken: BTreeMap<NodeId, Vec<GenericResource>> = BTreeMap::new();
    for draft in drafts.iter().filter(|draft| occupies(draft)) {
        if let Some(node) = draft.task.node_id {
            taken.entry(node).or_default().extend(draft.task.assigned.iter().cloned());
        }
    }
    for draft in drafts {
        let node = draft.task.node_id.filter(|_| waits(&draft.task)).and_then(|node| scene.nodes.get(&node));
        let Some(node) = node else { continue };
        let (has, reserved) = (&node.description.resources.generic, draft.task.spec.resources.reserved().generic);
        let taken = taken.entry(node.id).or_default();
        let assigned = generic_resource::assign(has, taken.iter(), &reserved);
        taken.extend(assigned.iter().cloned());
        draft.change(|task| task.assigned = assigned);
    }
}

/// Whether a task takes something up on its node.
pub(super) fn occupies(Draft { task, edit }: &Draft) -> bool {
    let state = task.status.state;
    state >= TaskState::Assigned && !state.is_terminal() && *edit != Edit::Delete
}

fn write_decision(scene: &Scene<'_>, draft: &mut Draft, decision: Result<Place, String>) {
    match decision {
        Ok(Place { node, volumes }) => draft.change(|task| {
            task.node_id = Some(node);
            task.volumes = volumes;
            task.status = TaskStatus {
                timestamp: scene.now,
                state: TaskState::Assigned,
                message: "scheduler assigned task to node".into(),
                ..TaskStatus::default()
            };
        }),
        // Said once, not at every look.
        Err(reason) if draft.task.status.error != reason => draft.change(|task| {
            task.status.timestamp = scene.now;
            task.status.error = reason;
        }),
        Err(_) => {}
    }
}

/// Whether a node may still be using a volume: one that is not heard of does until the volume was taken from it.
fn holds(scene: &Scene<'_>, node: NodeId, attached: &VolumeAttachment) -> bool {
    let volume = scene.tables.volumes.get(attached.id);
    !scene.is_lost(node) || volume.is_some_and(|volume| volume.status_on(node).is_some())
}

fn occupant(task: &Task) -> Occupant {
    Occupant { service: task.service_id, spec: task.spec.clone(), ports: task.ports.clone() }
}

fn cluster_view(scene: &Scene<'_>, drafts: &[Draft]) -> ClusterView {
    let mut view = ClusterView::default();
    for node in scene.nodes.values() {
        view.set_node(Arc::clone(node));
    }
    for volume in scene.tables.volumes.iter() {
        view.set_volume(Arc::clone(volume));
    }
    let mut failures: BTreeMap<(NodeId, ServiceId), usize> = BTreeMap::new();
    for draft in drafts {
        let task = &draft.task;
        let Some(node) = task.node_id else { continue };
        let status = &task.status;
        if occupies(draft) {
            view.add_task(node, &occupant(task));
            let held = task.volumes.iter().filter(|attached| holds(scene, node, attached)).cloned().collect::<Vec<_>>();
            view.take_volumes(node, &task.spec, &held);
        }
        let failed = matches!(status.state, TaskState::Failed | TaskState::Rejected);
        if failed && scene.now.since(status.timestamp) <= FAILING_WINDOW {
            *failures.entry((node, task.service_id)).or_default() += 1;
        }
    }
    for ((node, service), _) in failures.into_iter().filter(|&(_, count)| count >= FAILING_COUNT) {
        view.set_failing(node, service, true);
    }
    view
}
