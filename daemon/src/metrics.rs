//! Figures for Prometheus, under the names dockerd gives what both have.
//!
//! They are taken when asked for, from the state itself: there is nothing to keep in step.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use skep_engine::ContainerState;
use skep_manager::Manager;

use crate::daemon::Daemon;

const TEXT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// A manager that has not answered the leader for this long counts as unreachable.
const REACHABLE_WITHIN: Duration = Duration::from_secs(3);

type ByState = Family<Vec<(&'static str, String)>, Gauge>;

/// Serves `/metrics`.
pub(crate) fn router(daemon: Arc<Daemon>) -> Router {
    Router::new().route("/metrics", get(show)).with_state(daemon)
}

async fn show(State(daemon): State<Arc<Daemon>>) -> impl IntoResponse {
    let mut registry = Registry::default();
    engine(&daemon, &mut registry);
    let node = daemon.swarm.active().await;
    let manager = node.as_ref().and_then(|node| node.manager());
    gauge(&mut registry, "swarm_node_manager", "Whether this node is a manager", u64::from(manager.is_some()));
    if let Some(manager) = manager {
        swarm(&manager, &mut registry);
    }
    let mut text = String::new();
    encode(&mut text, &registry).expect("writing to a string does not fail");
    ([(CONTENT_TYPE, TEXT)], text)
}

fn gauge(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let gauge: Gauge = Gauge::default();
    gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
    registry.register(name, help, gauge);
}

fn counter(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let counter: Counter = Counter::default();
    counter.inc_by(value);
    registry.register(name, help, counter);
}

/// How many there are in each state; a state nobody is in is not listed.
fn by_state(registry: &mut Registry, name: &str, help: &str, states: impl Iterator<Item = &'static str>) {
    let family = ByState::default();
    for state in states {
        family.get_or_create(&vec![("state", state.to_owned())]).inc();
    }
    registry.register(name, help, family);
}

fn engine(daemon: &Daemon, registry: &mut Registry) {
    let containers = daemon.engine.list();
    let states = containers.iter().map(|container| match &container.state {
        ContainerState::Running(running) if running.paused => "paused",
        ContainerState::Running(_) => "running",
        ContainerState::Restarting(_) | ContainerState::Created | ContainerState::Exited(_) => "stopped",
    });
    by_state(registry, "engine_daemon_container_states_containers", "Containers of this host", states);
    gauge(registry, "engine_images", "Images of this host", daemon.engine.images().len() as u64);
}

fn swarm(manager: &Manager, registry: &mut Registry) {
    let (tables, store) = (manager.view(), manager.store());
    gauge(registry, "swarm_manager_leader", "Whether this manager leads", u64::from(manager.is_leader()));
    let nodes = tables.nodes.iter().map(|node| node.status.state.as_str());
    by_state(registry, "swarm_manager_nodes", "Nodes of the swarm", nodes);
    let tasks = tables.tasks.iter().map(|task| task.status.state.as_str());
    by_state(registry, "swarm_manager_tasks", "Tasks of the swarm", tasks);
    for (name, help, count) in [
        ("swarm_manager_services", "Services of the swarm", tables.services.len()),
        ("swarm_manager_secrets", "Secrets of the swarm", tables.secrets.len()),
        ("swarm_manager_configs", "Configs of the swarm", tables.configs.len()),
        ("swarm_raft_members", "Managers in consensus", store.members().len()),
    ] {
        gauge(registry, name, help, count as u64);
    }
    if manager.is_leader() {
        let reachable = store.reachable(REACHABLE_WITHIN).len() as u64;
        gauge(registry, "swarm_raft_reachable_members", "Managers that answer the leader, itself included", reachable);
    }
    gauge(registry, "swarm_raft_term", "The election this manager knows of", store.leadership().borrow().term);
    gauge(registry, "swarm_raft_applied_index", "The last log entry applied here", tables.index);
    let activity = store.activity();
    counter(registry, "swarm_raft_log_entries", "Log entries written here since the start", activity.entries);
    counter(registry, "swarm_raft_log_flushes", "Disk flushes of the log since the start", activity.flushes);
}
