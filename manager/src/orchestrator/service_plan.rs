//! One service: which slots it should have, and what becomes of the tasks in them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use skep_api::constraint::Constraint;
use skep_api::task::{Slot, TaskStatus};
use skep_api::{NodeId, Service, ServiceMode, Task, TaskState};

use super::{Alarm, Draft, Edit, Scene, TaskIds, reaper, restart, updater};

/// A service with its tasks, while it is being decided on.
pub(crate) struct ServicePlan {
    pub(crate) service: Arc<Service>,
    pub(crate) drafts: Vec<Draft>,
}

impl ServicePlan {
    pub(crate) fn new(scene: &Scene<'_>, service: &Arc<Service>) -> Self {
        let mut drafts: Vec<_> = scene.tables.tasks_of_service(service.id).map(Draft::stored).collect();
        // Oldest first; those made together in the order of their slots.
        drafts.sort_by_key(|draft| (draft.task.meta.created_at, draft.task.slot, draft.task.id));
        Self { service: service.clone(), drafts }
    }

    pub(crate) fn run(&mut self, scene: &Scene<'_>, ids: TaskIds<'_>, alarm: &mut Alarm) {
        self.release_lost(scene);
        if self.service.removed {
            self.drafts.iter_mut().for_each(|draft| draft.desire(TaskState::Remove));
        } else {
            self.retire_older_runs();
            self.enforce(scene);
            let wanted = self.wanted_slots(scene);
            self.retire_slots(&wanted);
            restart::refill(self, scene, &wanted, ids, alarm);
            if !self.is_job() {
                updater::advance(self, scene, ids, alarm);
            }
            restart::promote(self, scene, alarm);
        }
        reaper::reap(self, scene);
        self.drafts.retain(|draft| draft.edit != Edit::Delete || draft.task.meta.version != 0);
    }

    /// Tasks whose node is gone for good will never be heard of again.
    fn release_lost(&mut self, scene: &Scene<'_>) {
        for draft in &mut self.drafts {
            let gone = draft.task.node_id.is_some_and(|node| !scene.nodes.contains_key(&node));
            if gone && !draft.task.status.state.is_terminal() {
                draft.change(|task| {
                    task.status = TaskStatus {
                        timestamp: scene.now,
                        state: TaskState::Orphaned,
                        message: "the task's node was removed from the swarm".into(),
                        ..task.status.clone()
                    };
                });
            }
        }
    }

    pub(crate) fn is_job(&self) -> bool {
        self.service.spec.mode.is_job()
    }

    /// What tasks that may run are to come to.
    pub(crate) fn goal(&self) -> TaskState {
        if self.is_job() { TaskState::Complete } else { TaskState::Running }
    }

    fn iteration(&self) -> Option<u64> {
        self.service.job_status.map(|status| status.iteration)
    }

    /// How many more tasks may run beside those that do.
    pub(crate) fn room(&self) -> usize {
        match self.service.spec.mode {
            ServiceMode::Replicated { .. } | ServiceMode::Global | ServiceMode::GlobalJob => usize::MAX,
            ServiceMode::ReplicatedJob { max_concurrent, .. } => {
                let live = self.drafts.iter().filter(|draft| draft.is_live()).count();
                usize::try_from(max_concurrent).unwrap_or(usize::MAX).saturating_sub(live)
            }
        }
    }

    /// An update begins a job anew: what is left of older runs goes, whether it ended or not.
    fn retire_older_runs(&mut self) {
        let iteration = self.iteration();
        for draft in self.drafts.iter_mut().filter(|draft| draft.task.job_iteration != iteration) {
            draft.desire(TaskState::Remove);
        }
    }

    /// Tasks that may no longer run where they do are told to stop; their slots are filled anew.
    fn enforce(&mut self, scene: &Scene<'_>) {
        let constraints = self.constraints();
        for draft in self.drafts.iter_mut().filter(|draft| draft.is_live()) {
            let Some(node_id) = draft.task.node_id else { continue };
            let misfit = scene.nodes.get(&node_id).is_some_and(|node| {
                node.spec.availability == skep_api::Availability::Active
                    && constraints.iter().any(|constraint| !constraint.admits(node))
            });
            let drained = draft.task.volumes.iter().any(|attached| {
                let volume = scene.tables.volumes.get(attached.id);
                volume.is_some_and(|volume| volume.spec.cluster.availability == skep_api::Availability::Drain)
            });
            if misfit || drained || scene.gives_up_tasks(node_id) {
                draft.desire(TaskState::Shutdown);
            }
        }
    }

    fn constraints(&self) -> Vec<Constraint> {
        let texts = &self.service.spec.task_template.placement.constraints;
        texts.iter().filter_map(|text| text.parse().ok()).collect()
    }

    /// The slots that should be filled.
    fn wanted_slots(&self, scene: &Scene<'_>) -> BTreeSet<Slot> {
        match self.service.spec.mode {
            ServiceMode::Global => self.fitting_nodes(scene).collect(),
            ServiceMode::GlobalJob => {
                let here = |task: &Task| task.node_id.is_some_and(|node| scene.nodes.contains_key(&node));
                let tasks = self.drafts.iter().map(|draft| &draft.task);
                let done = tasks.filter(|task| task.is_done() && here(task)).map(|task| task.slot);
                self.fitting_nodes(scene).chain(done).collect()
            }
            ServiceMode::ReplicatedJob { total_completions, .. } => {
                // From 0, unlike replicas: docker's client counts on it.
                (0..total_completions).map(Slot::Replica).collect()
            }
            ServiceMode::Replicated { replicas } => {
                let mut slots = self.live_slots();
                let replicas = usize::try_from(replicas).unwrap_or(usize::MAX);
                if slots.len() > replicas {
                    return self.slots_to_keep(replicas);
                }
                // A slot whose task ended keeps its number.
                let ended = self.drafts.iter().filter(|draft| draft.task.desired_state < TaskState::Remove);
                let mut candidates: BTreeSet<Slot> = ended.map(|draft| draft.task.slot).collect();
                candidates.extend((1..).map(Slot::Replica).take(replicas));
                for slot in candidates {
                    if slots.len() == replicas {
                        break;
                    }
                    slots.insert(slot);
                }
                slots
            }
        }
    }

    fn fitting_nodes<'a>(&self, scene: &'a Scene<'_>) -> impl Iterator<Item = Slot> + use<'a> {
        let constraints = self.constraints();
        let fits = move |node: &skep_api::Node| {
            !node.gives_up_tasks() && constraints.iter().all(|constraint| constraint.admits(node))
        };
        scene.nodes.iter().filter(move |(_, node)| fits(node)).map(|(&id, _)| Slot::Node(id))
    }

    fn live_slots(&self) -> BTreeSet<Slot> {
        self.drafts.iter().filter(|draft| draft.is_live()).map(|draft| draft.task.slot).collect()
    }

    /// On scaling down: what does not run goes first, then the slots on the fullest nodes, then the
    /// highest numbers.
    fn slots_to_keep(&self, replicas: usize) -> BTreeSet<Slot> {
        let mut running: BTreeMap<Slot, Option<NodeId>> = BTreeMap::new();
        for draft in self.drafts.iter().filter(|draft| draft.is_live()) {
            let node = draft.task.node_id.filter(|_| draft.task.status.state == TaskState::Running);
            let entry = running.entry(draft.task.slot).or_default();
            *entry = entry.or(node);
        }
        let mut on_node: BTreeMap<NodeId, u64> = BTreeMap::new();
        let mut ranked: Vec<(bool, u64, Slot)> = Vec::new();
        for (&slot, node) in &running {
            let nth = node.map_or(0, |node| {
                let count = on_node.entry(node).or_default();
                *count += 1;
                *count
            });
            ranked.push((node.is_none(), nth, slot));
        }
        // A slot's rank is which one of its node's it is, so that every node keeps its first ones.
        ranked.sort_unstable();
        ranked.into_iter().take(replicas).map(|(_, _, slot)| slot).collect()
    }

    fn retire_slots(&mut self, wanted: &BTreeSet<Slot>) {
        for draft in self.drafts.iter_mut().filter(|draft| !wanted.contains(&draft.task.slot)) {
            draft.desire(TaskState::Remove);
        }
    }

    /// A new task for `slot`; it is placed by the scheduler.
    pub(crate) fn new_task(&self, scene: &Scene<'_>, slot: Slot, desired_state: TaskState, ids: TaskIds<'_>) -> Draft {
        let spec = &self.service.spec;
        let task = Task {
            id: ids(),
            // The store sets the rest; the time decides which of a slot's tasks is the newest.
            meta: skep_api::Meta { version: 0, spec_version: 0, created_at: scene.now, updated_at: scene.now },
            // Whoever fills the templates needs them, and nobody else.
            labels: if spec.task_template.container.may_be_filled() { spec.labels.clone() } else { BTreeMap::new() },
            spec: self.service.spec.task_template.clone(),
            service_id: self.service.id,
            service_name: self.service.spec.name.clone(),
            ports: self.service.spec.host_ports().cloned().collect(),
            slot,
            mesh_ports: spec.ingress_ports().map(|port| (port.protocol, port.target_port)).collect(),
            networks: Vec::new(),
            node_id: None,
            status: TaskStatus {
                timestamp: scene.now,
                state: TaskState::New,
                message: "created".into(),
                ..TaskStatus::default()
            },
            desired_state,
            job_iteration: self.iteration(),
            running_since: None,
            usual_log_driver: scene.tables.cluster().and_then(|cluster| cluster.spec.task_defaults.log_driver.clone()),
            assigned: Vec::new(),
            volumes: Vec::new(),
        };
        Draft { task: Arc::new(task), edit: Edit::Create }
    }

    /// Whether the task is not what the service's spec asks for now.
    pub(crate) fn is_dirty(&self, task: &Task) -> bool {
        if task.job_iteration != self.iteration() {
            return true;
        }
        // A port less takes nothing from a task; the first one needs a place in the ingress network.
        if task.mesh_ports.is_empty() && self.service.spec.ingress_ports().next().is_some() {
            return true;
        }
        let wanted = &self.service.spec.task_template;
        let ports: Vec<_> = self.service.spec.host_ports().cloned().collect();
        if Arc::ptr_eq(&task.spec, wanted) && task.ports == ports {
            return false;
        }
        // Placement alone renews nothing: who no longer fits is moved by `enforce`. Nor do new
        // credentials: the image is here.
        let mut now = (**wanted).clone();
        now.container.registry_auth = task.spec.container.registry_auth.clone();
        now.placement = task.spec.placement.clone();
        *task.spec != now || task.ports != ports
    }
}
