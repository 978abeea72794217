//! Drives one task: a step, a report, the next step.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use skep_api::container::ContainerSpec;
use skep_api::expansion::TemplateNode;
use skep_api::service::{PortConfig, Protocol};
use skep_api::task::{ContainerStatus, PortStatus};
use skep_api::{NodeId, Task, TaskState, TaskStatus, Timestamp, with_causes};
use skep_engine::{ContainerState, Engine, HealthStatus};
use tokio::sync::watch;

use crate::assignments::Payloads;
use crate::conversion::container_config;
use crate::images::Images;
use crate::listening;
use crate::reporter::Reporter;
use crate::step::{Step, next_step};
use crate::volumes::Volumes;

const STOP_GRACE: Duration = Duration::from_secs(10);
/// How long a task may take to listen on its ports before it counts as running anyway.
const LISTENING_LIMIT: Duration = Duration::from_secs(10);
const LISTENING_PAUSE: Duration = Duration::from_millis(10);

/// One task on its way.
pub(crate) struct Runner {
    pub(crate) task: Task,
    pub(crate) node: NodeId,
    pub(crate) engine: Arc<Engine>,
    pub(crate) payloads: Payloads,
    pub(crate) images: Images,
    pub(crate) volumes: Volumes,
    pub(crate) reporter: Reporter,
    pub(crate) desired: watch::Receiver<TaskState>,
}

impl Runner {
    /// Runs the task to its end. A wish that changes meanwhile is taken up at the next step, and
    /// at once while the task runs or its image is on the way.
    pub(crate) async fn run(mut self) {
        self.adopt().await;
        loop {
            // The agent stops: what runs goes on without us.
            if self.desired.has_changed().is_err() {
                return;
            }
            let desired = *self.desired.borrow_and_update();
            let observed = self.task.status.state;
            let Some(step) = next_step(observed, desired) else { return };
            tracing::debug!(task = %self.task.id, ?observed, ?desired, ?step, "a task's next step");
            match step {
                Step::Accept => self.report(TaskState::Accepted, "accepted"),
                Step::Prepare => self.prepare().await,
                Step::AwaitStart => {
                    if self.desired.changed().await.is_err() {
                        return;
                    }
                }
                Step::Start => self.start().await,
                Step::Watch => self.watch().await,
                Step::Stop => self.stop().await,
            }
        }
    }

    fn name(&self) -> String {
        self.task.name()
    }

    /// Takes up a container that is there already, from before the daemon's restart.
    async fn adopt(&mut self) {
        if self.task.status.state.is_terminal() {
            return;
        }
        let Ok(inspection) = self.engine.inspect(&self.name()) else { return };
        match inspection.state {
            // Its payloads were only in memory: it is made again before it starts.
            ContainerState::Created => {
                if let Err(error) =
                    self.engine.remove(&self.name(), skep_engine::RemoveOptions { force: true, volumes: true }).await
                {
                    tracing::warn!(task = %self.task.id, %error, "a prepared container could not be removed");
                }
            }
            // Its end, if it has ended, is found when it is watched.
            ContainerState::Running(_) | ContainerState::Restarting(_) | ContainerState::Exited(_) => {
                self.move_to(TaskState::Running, "started");
            }
        }
    }

    fn move_to(&mut self, state: TaskState, message: &str) {
        if self.task.status.state < state {
            self.report(state, message);
        } else {
            self.reporter.report(self.task.id, self.task.status.clone());
        }
    }

    fn report(&mut self, state: TaskState, message: &str) {
        self.task.status = TaskStatus {
            timestamp: now(),
            state,
            message: message.to_owned(),
            error: String::new(),
            container_status: self.container_status(),
            port_status: self.port_status(),
        };
        self.reporter.report(self.task.id, self.task.status.clone());
    }

    fn report_error(&mut self, state: TaskState, message: &str, error: String) {
        self.report(state, message);
        self.task.status.error = error;
        self.reporter.report(self.task.id, self.task.status.clone());
    }

    fn container_status(&self) -> Option<ContainerStatus> {
        let inspection = self.engine.inspect(&self.name()).ok()?;
        let (pid, exit_code) = match inspection.state {
            ContainerState::Created => (0, 0),
            ContainerState::Running(running) => (running.pid, 0),
            ContainerState::Restarting(exit) | ContainerState::Exited(exit) => (0, exit.code),
        };
        Some(ContainerStatus { container_id: inspection.id, pid, exit_code })
    }

    /// The ports in force, with those that the node picked.
    fn port_status(&self) -> PortStatus {
        let Ok(inspection) = self.engine.inspect(&self.name()) else { return PortStatus::default() };
        let ContainerState::Running(running) = inspection.state else { return PortStatus::default() };
        let ports = self.task.ports.iter().zip(running.ports);
        let ports = ports.map(|(wanted, got)| PortConfig { published_port: got.host_port, ..wanted.clone() });
        PortStatus { ports: ports.collect() }
    }

    async fn prepare(&mut self) {
        self.report(TaskState::Preparing, "preparing");
        let mut desired = self.desired.clone();
        let prepared = tokio::select! {
            prepared = self.make_container() => Some(prepared),
            // Not wanted any more: a pull that takes long is given up.
            _ = desired.wait_for(|&desired| !desired.is_wanted()) => None,
        };
        match prepared {
            Some(Ok(())) => self.report(TaskState::Ready, "prepared"),
            Some(Err(error)) => self.report_error(TaskState::Rejected, "preparing", error),
            None => {}
        }
    }

    async fn make_container(&self) -> Result<(), String> {
        let spec: &ContainerSpec = &self.task.spec.container;
        let (image, volumes) = tokio::try_join!(
            self.images.get(&self.engine, &spec.image, &spec.registry_auth),
            self.volumes.ready(&self.task.volumes),
        )?;
        let payloads = self.payloads.for_task(&self.task, &self.template_node())?;
        let none = BTreeMap::new();
        let (driver, options) =
            self.task.log_driver().map_or(("", &none), |driver| (driver.name.as_str(), &driver.options));
        let log = self.engine.log_config(driver, options).map_err(|error| error.to_string())?;
        let mut config = container_config(&self.task, &self.template_node(), payloads, &volumes, &image, log)?;
        config.runtime = self.engine.default_runtime();
        self.engine.create(config).map(drop).map_err(|error| with_causes(&error))
    }

    /// What templates can say of this node.
    fn template_node(&self) -> TemplateNode {
        TemplateNode {
            id: self.node,
            hostname: skep_engine::host_name(),
            os: std::env::consts::OS.into(),
            architecture: std::env::consts::ARCH.into(),
        }
    }

    async fn start(&mut self) {
        self.report(TaskState::Starting, "starting");
        if let Err(error) = self.start_container().await {
            self.report_error(TaskState::Failed, "starting", error);
            return;
        }
        // A container with a health check counts as running once it is healthy.
        match self.await_state(|state| !is_starting(state)).await {
            Awaited::State(ContainerState::Running(running)) => {
                self.await_listening(running.pid).await;
                self.report(TaskState::Running, "started");
            }
            Awaited::State(state) => self.report_end(&state).await,
            Awaited::Gone => self.report_gone("starting"),
            Awaited::OtherWish => {}
        }
    }

    /// Waits until the task listens where connections will come to as soon as it counts as running;
    /// not for ever, for it may have its reasons.
    async fn await_listening(&self, pid: i32) {
        let ports = self.task.mesh_ports.iter().filter(|(protocol, _)| *protocol == Protocol::Tcp);
        let ports: Vec<u16> = ports.map(|&(_, port)| port).collect();
        let listens = async {
            while !listening::on_all(pid, &ports) {
                tokio::time::sleep(LISTENING_PAUSE).await;
            }
        };
        let mut desired = self.desired.clone();
        tokio::select! {
            () = listens => {}
            // It has ended.
            _ = self.await_state(has_ended) => {}
            _ = desired.wait_for(|&desired| !desired.is_wanted()) => {}
            () = tokio::time::sleep(LISTENING_LIMIT) => {}
        }
    }

    async fn start_container(&self) -> Result<(), String> {
        if self.engine.inspect(&self.name()).is_err() {
            self.make_container().await?;
        }
        self.engine.start(&self.name()).await.map_err(|error| with_causes(&error))
    }

    async fn watch(&mut self) {
        match self.await_state(has_ended).await {
            Awaited::State(state) => self.report_end(&state).await,
            Awaited::Gone => self.report_gone("started"),
            Awaited::OtherWish => {}
        }
    }

    /// Waits for a state of the container.
    async fn await_state(&self, wanted: fn(&ContainerState) -> bool) -> Awaited {
        let Ok(mut state) = self.engine.watch(&self.name()) else { return Awaited::Gone };
        let mut desired = self.desired.clone();
        tokio::select! {
            found = state.wait_for(wanted) => {
                found.map_or(Awaited::Gone, |state| Awaited::State(state.clone()))
            }
            _ = desired.wait_for(|&desired| !desired.is_wanted()) => Awaited::OtherWish,
        }
    }

    fn report_gone(&mut self, message: &str) {
        let error = format!("No such container: {}: somebody removed it", self.name());
        self.report_error(TaskState::Failed, message, error);
    }

    async fn report_end(&mut self, state: &ContainerState) {
        match state {
            ContainerState::Exited(exit) if exit.code == 0 => self.report(TaskState::Complete, "finished"),
            ContainerState::Exited(exit) => {
                let killed = if exit.oom_killed { ": killed for want of memory" } else { "" };
                let detail = if exit.error.is_empty() { String::new() } else { format!(": {}", exit.error) };
                let error = format!("task: non-zero exit ({}){killed}{detail}", exit.code);
                self.report_error(TaskState::Failed, "started", error);
            }
            ContainerState::Running(_) => {
                let stopped = self.engine.stop(&self.name(), Some(self.grace())).await;
                let code = stopped.map_or_else(|error| with_causes(&error), |exit| exit.code.to_string());
                let error = format!("task: non-zero exit ({code}): unhealthy container");
                self.report_error(TaskState::Failed, "started", error);
            }
            ContainerState::Created | ContainerState::Restarting(_) => {}
        }
    }

    fn grace(&self) -> Duration {
        self.task.spec.container.stop_grace_period.map_or(STOP_GRACE, skep_api::units::Nanos::duration)
    }

    async fn stop(&mut self) {
        let running = matches!(
            self.engine.inspect(&self.name()).map(|inspection| inspection.state),
            Ok(ContainerState::Running(_))
        );
        let stopped = if running { self.engine.stop(&self.name(), Some(self.grace())).await.map(drop) } else { Ok(()) };
        match stopped {
            Ok(()) => self.report(TaskState::Shutdown, "shutdown"),
            Err(error) => self.report_error(TaskState::Failed, "shutting down", with_causes(&error)),
        }
    }
}

/// What waiting for a container's state came to.
enum Awaited {
    State(ContainerState),
    /// The task is not wanted any more, or nobody says what is.
    OtherWish,
    /// There is no such container.
    Gone,
}

fn is_starting(state: &ContainerState) -> bool {
    match state {
        ContainerState::Running(running) => running.health == HealthStatus::Starting,
        ContainerState::Created | ContainerState::Restarting(_) => true,
        ContainerState::Exited(_) => false,
    }
}

fn has_ended(state: &ContainerState) -> bool {
    match state {
        ContainerState::Running(running) => running.health == HealthStatus::Unhealthy,
        ContainerState::Created | ContainerState::Restarting(_) => false,
        ContainerState::Exited(_) => true,
    }
}

fn now() -> Timestamp {
    Timestamp::from_system(SystemTime::now())
}
