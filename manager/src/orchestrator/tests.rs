//! The orchestrator against a small world of its own: services, nodes, and workers that do as they
//! are told (or not), with time turned by hand.

use std::collections::BTreeMap;
use std::time::Duration;

use skep_api::service::{FailureAction, UpdateConfig, UpdateOrder, UpdateState};
use skep_api::task::{RestartCondition, RestartPolicy, TaskSpec};
use skep_api::units::Nanos;
use skep_api::{
    Availability, Cluster, JobStatus, NodeId, NodeState, Service, ServiceId, ServiceMode, ServiceSpec, Task, TaskId,
    TaskState, Timestamp, node::testing,
};
use skep_raft_store::{Action, Tables};

use super::{Plan, plan};

/// The state that the store would hold, and a clock.
struct World {
    tables: Tables,
    now: Timestamp,
    index: u64,
    next_task: u128,
    /// What a worker makes of a task that is to run.
    outcome: fn(&Task) -> TaskState,
}

const SERVICE: ServiceId = ServiceId::from_u128(1);

impl World {
    fn new(nodes: u128, spec: ServiceSpec) -> Self {
        let mut world = Self {
            tables: Tables::default(),
            now: Timestamp::from_nanos(1_000_000_000_000),
            index: 0,
            next_task: 1,
            outcome: |_| TaskState::Running,
        };
        for number in 1..=nodes {
            world.write(vec![Action::Create(testing::node(number).into())]);
        }
        let job_status = spec.mode.is_job().then(|| JobStatus::first(world.now));
        world.write(vec![Action::Create(
            Service {
                id: SERVICE,
                meta: skep_api::Meta::default(),
                spec,
                previous_spec: None,
                endpoint: skep_api::service::Endpoint::default(),
                update_status: None,
                job_status,
                removed: false,
            }
            .into(),
        )]);
        world
    }

    fn write(&mut self, actions: Vec<Action>) {
        self.index += 1;
        let transaction = skep_raft_store::Transaction { at: self.now, actions };
        self.tables.apply_for_test(self.index, transaction).unwrap();
    }

    /// Lets managers and workers act until nothing changes at this time.
    fn settle(&mut self) -> Option<Timestamp> {
        for _ in 0..200 {
            let mut next_task = self.next_task;
            let Plan { transaction, look_again } = plan(&self.tables, self.now, &mut || {
                next_task += 1;
                TaskId::from_u128(next_task)
            });
            self.next_task = next_task;
            let planned = !transaction.is_empty();
            if planned {
                self.write(transaction.actions);
            }
            if !self.work() && !planned {
                return look_again;
            }
        }
        panic!("it never settles");
    }

    /// Workers do one round of what they are told.
    fn work(&mut self) -> bool {
        let mut actions = Vec::new();
        for task in self.tables.tasks.iter() {
            let Some(node) = task.node_id.and_then(|node| self.tables.nodes.get(node)) else { continue };
            if node.status.state != NodeState::Ready {
                continue;
            }
            let state = task.status.state;
            let next = match task.desired_state {
                _ if state.is_terminal() || state < TaskState::Assigned => continue,
                TaskState::Ready if state < TaskState::Ready => TaskState::Ready,
                TaskState::Running | TaskState::Complete if state < TaskState::Running => TaskState::Running,
                TaskState::Running | TaskState::Complete => (self.outcome)(task),
                desired if !desired.is_wanted() => TaskState::Shutdown,
                _ => continue,
            };
            if next == state {
                continue;
            }
            let mut task = (**task).clone();
            task.status.state = next;
            task.status.timestamp = self.now;
            if next == TaskState::Running {
                task.running_since = Some(self.now);
            }
            actions.push(Action::Update(task.into()));
        }
        let busy = !actions.is_empty();
        if busy {
            self.write(actions);
        }
        busy
    }

    /// Goes through time, from one thing to do to the next.
    fn pass(&mut self, time: Duration) {
        let end = self.now.plus(time);
        while let Some(at) = self.settle().filter(|&at| at <= end) {
            self.now = at.max(self.now.plus(Duration::from_nanos(1)));
        }
        self.now = end;
        self.settle();
    }

    fn service(&self) -> &Service {
        self.tables.services.get(SERVICE).unwrap()
    }

    fn change(&mut self, change: impl FnOnce(&mut Service)) {
        let mut service = self.service().clone();
        change(&mut service);
        self.write(vec![Action::Update(service.into())]);
    }

    /// What `service update` does to the stored service.
    fn update(&mut self, change: impl FnOnce(&mut TaskSpec)) {
        let now = self.now;
        self.change(|service| {
            let mut spec = service.spec.clone();
            change(std::sync::Arc::make_mut(&mut spec.task_template));
            service.previous_spec = Some(std::mem::replace(&mut service.spec, spec));
            service.update_status = Some(skep_api::service::UpdateStatus {
                state: UpdateState::Updating,
                started_at: now,
                completed_at: None,
                message: String::new(),
            });
        });
    }

    fn node(&mut self, number: u128, change: impl FnOnce(&mut skep_api::Node)) {
        let mut node = self.tables.nodes.get(NodeId::from_u128(number)).unwrap().as_ref().clone();
        change(&mut node);
        self.write(vec![Action::Update(node.into())]);
    }

    /// Running tasks per node.
    fn running(&self) -> String {
        let mut counts: BTreeMap<u128, usize> = BTreeMap::new();
        for task in
            self.tables.tasks.iter().filter(|task| task.is_runnable() && task.status.state == TaskState::Running)
        {
            *counts.entry(task.node_id.map_or(0, |node| u128::from_be_bytes(node.to_bytes()))).or_default() += 1;
        }
        let texts: Vec<_> = counts.iter().map(|(node, count)| format!("n{node}:{count}")).collect();
        texts.join(" ")
    }

    fn update_state(&self) -> Option<UpdateState> {
        self.service().update_status.as_ref().map(|status| status.state)
    }
}

fn replicated(replicas: u64) -> ServiceSpec {
    ServiceSpec { name: "web".into(), mode: ServiceMode::Replicated { replicas }, ..ServiceSpec::default() }
}

fn with_update(replicas: u64, config: UpdateConfig) -> ServiceSpec {
    ServiceSpec { update_config: Some(config), ..replicated(replicas) }
}

#[test]
fn replicas_follow_the_declared_number_and_a_second_look_changes_nothing() {
    let mut world = World::new(3, replicated(6));
    world.settle();
    assert_eq!(world.running(), "n1:2 n2:2 n3:2");
    world.change(|service| service.spec.mode = ServiceMode::Replicated { replicas: 3 });
    world.settle();
    assert_eq!(world.running(), "n1:1 n2:1 n3:1", "the fullest nodes give up first");
    let again = plan(&world.tables, world.now, &mut || panic!("no task is wanted"));
    assert!(again.transaction.is_empty());
    world.change(|service| service.spec.mode = ServiceMode::Replicated { replicas: 0 });
    world.settle();
    assert_eq!((world.running().as_str(), world.tables.tasks.len()), ("", 0));
}

#[test]
fn a_global_service_has_one_task_on_each_node_that_may_have_one() {
    let mut world = World::new(3, ServiceSpec { mode: ServiceMode::Global, ..replicated(0) });
    world.settle();
    assert_eq!(world.running(), "n1:1 n2:1 n3:1");
    world.node(2, |node| node.spec.availability = Availability::Drain);
    world.settle();
    assert_eq!(world.running(), "n1:1 n3:1");
    world.node(2, |node| node.spec.availability = Availability::Active);
    world.settle();
    assert_eq!(world.running(), "n1:1 n2:1 n3:1");
}

#[test]
fn tasks_of_a_lost_node_are_replaced_at_once_and_never_run_twice_in_a_slot() {
    let mut world = World::new(2, replicated(4));
    world.settle();
    world.node(2, |node| node.status.state = NodeState::Down);
    world.settle();
    let on_first = world.tables.tasks_of_node(NodeId::from_u128(1)).filter(|task| task.is_runnable()).count();
    assert_eq!(on_first, 4);
    world.node(2, |node| node.status.state = NodeState::Ready);
    world.settle();
    assert_eq!(world.running(), "n1:4", "the returned node ends its old tasks; nothing is moved back");
}

#[test]
fn an_ended_task_is_replaced_after_the_delay_and_not_at_all_if_so_asked() {
    let mut world = World::new(1, replicated(1));
    world.settle();
    world.outcome = |_| TaskState::Failed;
    world.settle();
    world.outcome = |_| TaskState::Running;
    world.pass(Duration::from_secs(4));
    assert_eq!(world.running(), "", "5 seconds have not passed");
    world.pass(Duration::from_secs(2));
    assert_eq!(world.running(), "n1:1");

    let mut world = World::new(1, replicated(1));
    world.change(|service| {
        std::sync::Arc::make_mut(&mut service.spec.task_template).restart_policy =
            Some(RestartPolicy { condition: RestartCondition::OnFailure, ..RestartPolicy::default() });
    });
    world.settle();
    world.outcome = |_| TaskState::Complete;
    world.pass(Duration::from_secs(60));
    assert_eq!(world.tables.tasks.len(), 1, "what ended well is not started again");
}

#[test]
fn restarts_are_counted_and_slow_down() {
    let mut world = World::new(1, replicated(1));
    world.outcome = |_| TaskState::Failed;
    world.pass(Duration::from_secs(600));
    let tried = world.next_task - 1;
    assert!((8..=40).contains(&tried), "five seconds apart for ever would be 120 tries: {tried}");
    assert!(world.tables.tasks.len() <= 6, "history is bounded: {}", world.tables.tasks.len());

    let mut world = World::new(1, replicated(1));
    world.change(|service| {
        std::sync::Arc::make_mut(&mut service.spec.task_template).restart_policy =
            Some(RestartPolicy { max_attempts: Some(2), ..RestartPolicy::default() });
    });
    world.outcome = |_| TaskState::Failed;
    world.pass(Duration::from_secs(600));
    assert_eq!(world.next_task - 1, 3, "the first run and two more");
}

#[test]
fn an_update_renews_so_many_at_a_time_and_completes() {
    let config = UpdateConfig { parallelism: 2, delay: Nanos::from_secs(10), ..UpdateConfig::ABSENT };
    let mut world = World::new(3, with_update(6, config));
    world.settle();
    world.update(|spec| spec.force_update = 1);
    let renewed = |world: &World| {
        world.tables.tasks.iter().filter(|task| task.is_runnable() && task.spec.force_update == 1).count()
    };
    world.settle();
    assert_eq!(renewed(&world), 2);
    world.pass(Duration::from_secs(11));
    assert_eq!(renewed(&world), 4);
    world.pass(Duration::from_secs(30));
    assert_eq!((renewed(&world), world.update_state()), (6, Some(UpdateState::Completed)));
}

#[test]
fn start_first_keeps_the_old_task_until_the_new_one_runs() {
    let config = UpdateConfig { order: UpdateOrder::StartFirst, ..UpdateConfig::ABSENT };
    let mut world = World::new(2, with_update(2, config));
    world.settle();
    world.update(|spec| spec.force_update = 1);
    let mut least = usize::MAX;
    for _ in 0..40 {
        let Plan { transaction, .. } = plan(&world.tables, world.now, &mut TaskId::random);
        if !transaction.is_empty() {
            world.write(transaction.actions);
        }
        world.work();
        let running = world.tables.tasks.iter().filter(|t| t.status.state == TaskState::Running).count();
        least = least.min(running);
        world.now = world.now.plus(Duration::from_millis(500));
    }
    assert_eq!(least, 2, "never fewer than declared");
    assert_eq!(world.update_state(), Some(UpdateState::Completed));
}

#[test]
fn a_failing_update_pauses_goes_on_or_rolls_back() {
    for (action, want) in [
        (FailureAction::Pause, UpdateState::Paused),
        (FailureAction::Continue, UpdateState::Updating),
        (FailureAction::Rollback, UpdateState::RollbackCompleted),
    ] {
        let config = UpdateConfig { failure_action: action, ..UpdateConfig::ABSENT };
        let mut world = World::new(2, with_update(3, config));
        world.settle();
        world.outcome = |task| if task.spec.force_update == 7 { TaskState::Failed } else { TaskState::Running };
        world.update(|spec| spec.force_update = 7);
        world.pass(Duration::from_secs(60));
        assert_eq!(world.update_state(), Some(want), "{action:?}");
        if action == FailureAction::Rollback {
            assert_eq!(world.service().spec.task_template.force_update, 0);
            let running = world.tables.tasks.iter().filter(|task| task.is_runnable()).count();
            assert_eq!(running, 3);
        }
    }
}

#[test]
fn a_removed_service_goes_with_its_last_task() {
    let mut world = World::new(2, replicated(4));
    world.settle();
    world.change(|service| service.removed = true);
    world.settle();
    assert!(world.tables.services.is_empty() && world.tables.tasks.is_empty());
}

#[test]
fn history_is_kept_as_long_as_the_swarm_says() {
    let mut world = World::new(1, replicated(1));
    let cluster = Cluster {
        id: skep_api::ClusterId::from_u128(1),
        meta: skep_api::Meta::default(),
        spec: skep_api::ClusterSpec {
            orchestration: skep_api::cluster::OrchestrationConfig { task_history_retention_limit: 2 },
            ..skep_api::ClusterSpec::default()
        },
        root_ca: skep_api::cluster::RootCa {
            certificate_pem: String::new(),
            key_pem: skep_api::SecretBytes::default(),
            cross_signed_pem: String::new(),
        },
        join_tokens: skep_api::cluster::JoinTokens {
            worker: skep_api::SecretBytes::default(),
            manager: skep_api::SecretBytes::default(),
        },
        removed_nodes: std::collections::BTreeSet::new(),
        unlock_key: skep_api::SecretBytes::default(),
        data_path_port: 4789,
        default_addr_pool: vec![],
        subnet_size: 24,
        incarnation: 0,
        next_root: None,
    };
    world.write(vec![Action::Create(cluster.into())]);
    world.outcome = |_| TaskState::Failed;
    world.pass(Duration::from_secs(120));
    assert!(world.tables.tasks.len() <= 2, "{}", world.tables.tasks.len());
}

/// A job's tasks: how many run, how many are done, how many failed.
fn job_counts(world: &World) -> (usize, usize, usize) {
    let count = |counts: &dyn Fn(&Task) -> bool| world.tables.tasks.iter().filter(|task| counts(task)).count();
    (
        count(&|task| task.is_runnable() && task.status.state == TaskState::Running),
        count(&Task::is_done),
        count(&|task| task.status.state == TaskState::Failed),
    )
}

fn job(max_concurrent: u64, total_completions: u64) -> ServiceSpec {
    ServiceSpec { mode: ServiceMode::ReplicatedJob { max_concurrent, total_completions }, ..replicated(0) }
}

fn end_one(world: &mut World, state: TaskState) {
    let task = world.tables.tasks.iter().find(|task| task.is_runnable()).unwrap();
    let mut task = (**task).clone();
    task.status.state = state;
    task.status.timestamp = world.now;
    world.write(vec![Action::Update(task.into())]);
    world.settle();
}

#[test]
fn a_job_runs_so_many_at_a_time_until_enough_ended_well() {
    let mut world = World::new(2, job(2, 5));
    world.settle();
    assert_eq!(job_counts(&world), (2, 0, 0));
    end_one(&mut world, TaskState::Complete);
    assert_eq!(job_counts(&world), (2, 1, 0));
    end_one(&mut world, TaskState::Failed);
    assert_eq!(job_counts(&world), (1, 1, 1), "what failed is tried again after the delay, and keeps its place");
    world.pass(Duration::from_secs(6));
    assert_eq!(job_counts(&world), (2, 1, 1));
    world.outcome = |_| TaskState::Complete;
    world.pass(Duration::from_secs(60));
    assert_eq!(job_counts(&world), (0, 5, 1));
    let again = plan(&world.tables, world.now, &mut || panic!("no task is wanted"));
    assert!(again.transaction.is_empty());
    let slots: std::collections::BTreeSet<_> =
        world.tables.tasks.iter().filter(|task| task.is_done()).map(|task| task.slot).collect();
    assert_eq!(slots.len(), 5, "each slot is done once");
}

#[test]
fn an_update_begins_a_job_anew_once_what_ran_has_ended() {
    let mut world = World::new(1, job(1, 2));
    world.settle();
    end_one(&mut world, TaskState::Complete);
    assert_eq!(job_counts(&world), (1, 1, 0));
    let now = world.now;
    world.change(|service| service.job_status = service.job_status.map(|status| status.next(now)));
    world.settle();
    let iterations: Vec<_> = world.tables.tasks.iter().map(|task| task.job_iteration).collect();
    assert_eq!((job_counts(&world), iterations), ((1, 0, 0), vec![Some(1)]), "nothing of the first run is left");
    world.outcome = |_| TaskState::Complete;
    world.settle();
    assert_eq!(job_counts(&world), (0, 2, 0));
}

#[test]
fn a_job_whose_tasks_are_not_tried_again_stays_undone() {
    let mut spec = job(3, 3);
    std::sync::Arc::make_mut(&mut spec.task_template).restart_policy =
        Some(RestartPolicy { condition: RestartCondition::None, ..RestartPolicy::default() });
    let mut world = World::new(1, spec);
    world.outcome =
        |task| if task.slot == skep_api::task::Slot::Replica(2) { TaskState::Failed } else { TaskState::Complete };
    world.pass(Duration::from_secs(60));
    assert_eq!(job_counts(&world), (0, 2, 1));
}

#[test]
fn a_global_job_runs_once_on_each_node_also_on_those_that_come_later() {
    let mut world = World::new(2, ServiceSpec { mode: ServiceMode::GlobalJob, ..replicated(0) });
    world.outcome = |_| TaskState::Complete;
    world.settle();
    assert_eq!(job_counts(&world), (0, 2, 0));
    world.write(vec![Action::Create(testing::node(3).into())]);
    world.node(1, |node| node.spec.availability = Availability::Drain);
    world.settle();
    assert_eq!(job_counts(&world), (0, 3, 0), "what is done is not forgotten with a drained node");
    world.node(1, |node| node.spec.availability = Availability::Active);
    world.settle();
    assert_eq!((job_counts(&world), world.tables.tasks.len()), ((0, 3, 0), 3), "and not done again");
}
