//! Decides what tasks there should be: (the shared state, now) → what to write, and when to look
//! again.
//!
//! Level-triggered and without memory: everything it needs is in the store, so a new leader goes on
//! where the old one stopped, and running it twice changes nothing the second time. Creating a
//! service's tasks, giving them addresses and placing them is one transaction.

mod addressing;
mod placement;
mod reaper;
mod restart;
mod service_plan;
mod updater;
mod volumes;

use std::collections::BTreeMap;
use std::sync::Arc;

use skep_api::{Node, NodeId, ObjectKey, Service, Task, TaskId, TaskState, Timestamp};
use skep_raft_store::{Tables, Transaction};

use service_plan::ServicePlan;
pub(crate) use updater::roll_back;

/// Where new task ids come from; a seeded one makes a run repeatable.
pub(crate) type TaskIds<'a> = &'a mut dyn FnMut() -> TaskId;

/// What is to be written, and when to look again if nothing happens before.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) transaction: Transaction,
    pub(crate) look_again: Option<Timestamp>,
}

/// One task, as stored or as it is about to be.
#[derive(Clone, Debug)]
pub(crate) struct Draft {
    pub(crate) task: Arc<Task>,
    pub(crate) edit: Edit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Edit {
    Keep,
    Create,
    Update,
    Delete,
}

impl Draft {
    fn stored(task: &Arc<Task>) -> Self {
        Self { task: task.clone(), edit: Edit::Keep }
    }

    pub(crate) fn change(&mut self, change: impl FnOnce(&mut Task)) {
        change(Arc::make_mut(&mut self.task));
        if self.edit == Edit::Keep {
            self.edit = Edit::Update;
        }
    }

    /// Moves the desired state down, never up.
    pub(crate) fn desire(&mut self, state: TaskState) {
        if self.task.desired_state < state {
            self.change(|task| task.desired_state = state);
        }
    }

    pub(crate) fn is_live(&self) -> bool {
        self.edit != Edit::Delete && self.task.is_runnable()
    }
}

/// Keeps the earliest of the times to look again.
#[derive(Debug, Default)]
pub(crate) struct Alarm(Option<Timestamp>);

impl Alarm {
    pub(crate) fn at(&mut self, time: Timestamp) {
        self.0 = Some(self.0.map_or(time, |earliest| earliest.min(time)));
    }
}

/// The cluster as one look at it needs it.
pub(crate) struct Scene<'a> {
    pub(crate) tables: &'a Tables,
    pub(crate) nodes: BTreeMap<NodeId, &'a Arc<Node>>,
    pub(crate) history_limit: i64,
    pub(crate) now: Timestamp,
}

impl Scene<'_> {
    /// Whether what runs on the node must be replaced: the node is down, drained or gone.
    pub(crate) fn gives_up_tasks(&self, node: NodeId) -> bool {
        self.nodes.get(&node).is_none_or(|node| node.gives_up_tasks())
    }

    /// Whether nothing that the node still says can be waited for.
    pub(crate) fn is_lost(&self, node: NodeId) -> bool {
        self.nodes.get(&node).is_none_or(|node| node.status.state == skep_api::NodeState::Down)
    }
}

/// Looks at everything and says what to write.
pub(crate) fn plan(tables: &Tables, now: Timestamp, ids: TaskIds<'_>) -> Plan {
    let history_limit = tables.cluster().map_or(5, |c| c.spec.orchestration.task_history_retention_limit);
    let scene = Scene { tables, nodes: tables.nodes.iter().map(|node| (node.id, node)).collect(), history_limit, now };
    let mut alarm = Alarm::default();
    let mut transaction = Transaction::new(now);
    let mut drafts = Vec::new();
    for service in tables.services.iter() {
        let mut plan = ServicePlan::new(&scene, service);
        plan.run(&scene, ids, &mut alarm);
        write_service(&mut transaction, service, plan.service, plan.drafts.is_empty());
        drafts.extend(plan.drafts);
    }
    addressing::give(&scene, &mut drafts, &mut transaction);
    placement::place(&scene, &mut drafts);
    volumes::follow(&scene, &drafts, &mut transaction);
    for Draft { task, edit } in drafts {
        match edit {
            Edit::Keep => {}
            Edit::Create => transaction.create(skep_api::Object::Task(task)),
            Edit::Update => transaction.update(skep_api::Object::Task(task)),
            Edit::Delete => transaction.delete(ObjectKey::Task(task.id), task.meta.version),
        }
    }
    Plan { transaction, look_again: alarm.0 }
}

/// Writes a service that changed; one that was removed goes with its last task.
fn write_service(transaction: &mut Transaction, before: &Arc<Service>, after: Arc<Service>, empty: bool) {
    if after.removed && empty {
        transaction.delete(ObjectKey::Service(after.id), after.meta.version);
    } else if !Arc::ptr_eq(before, &after) {
        transaction.update(skep_api::Object::Service(after));
    }
}

#[cfg(test)]
mod tests;
