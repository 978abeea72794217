//! Containers of this host.

pub(super) mod attach;
pub(super) mod create;

use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Query};
use axum::http::StatusCode;
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Value, json};
use skep_api::Timestamp;
use skep_engine::{ContainerState, HealthStatus, Inspection, JoinedNetwork, NetworkMode, PublishedPort, familiar};

use super::swarm::is_on;
use super::{ApiError, State};
use crate::filters::Filters;
use crate::logs::{self, LogParams};

#[derive(Deserialize)]
pub(super) struct ListQuery {
    #[serde(default)]
    all: String,
    filters: Option<String>,
    limit: Option<usize>,
}

pub(super) async fn list(state: State, Query(query): Query<ListQuery>) -> Result<Json<Vec<Value>>, ApiError> {
    let known = ["id", "name", "label", "status", "ancestor", "health"];
    let filters = Filters::parse(query.filters.as_deref(), &known).map_err(ApiError::bad_request)?;
    let all = is_on(&query.all) || filters.is_set("status") || query.limit.is_some();
    let mut containers: Vec<_> = state
        .engine
        .list()
        .into_iter()
        .filter(|c| all || matches!(c.state, ContainerState::Running(_)))
        .filter(|c| {
            filters.any("id", |id| c.id.starts_with(id))
                && filters.any("name", |name| c.config.name.contains(name.trim_start_matches('/')))
                && filters.labels("label", &c.config.labels)
                && filters.any("status", |status| c.state.as_str() == status)
                && filters.any("ancestor", |image| c.config.image == image || familiar(&c.config.image) == image)
                && filters.any("health", |health| health_of(&c.state).as_str() == health)
        })
        .collect();
    containers.sort_by_key(|container| std::cmp::Reverse(container.created));
    containers.truncate(query.limit.unwrap_or(usize::MAX));
    Ok(Json(containers.iter().map(summary).collect()))
}

fn health_of(state: &ContainerState) -> HealthStatus {
    match state {
        ContainerState::Running(running) => running.health,
        ContainerState::Created | ContainerState::Exited(_) => HealthStatus::None,
    }
}

fn ports(state: &ContainerState) -> &[PublishedPort] {
    match state {
        ContainerState::Running(running) => &running.ports,
        ContainerState::Created | ContainerState::Exited(_) => &[],
    }
}

fn summary(container: &Inspection) -> Value {
    let config = &container.config;
    let ports: Vec<_> = ports(&container.state)
        .iter()
        .map(|port| {
            json!({"IP": "0.0.0.0", "PrivatePort": port.container_port, "PublicPort": port.host_port,
            "Type": port.protocol.as_str()})
        })
        .collect();
    json!({
        "Id": container.id, "Names": [format!("/{}", config.name)], "Image": familiar(&config.image),
        "ImageID": config.image_id, "Command": config.command().join(" "),
        "Created": container.created.as_nanos() / 1_000_000_000, "Ports": ports, "Labels": config.labels,
        "State": container.state.as_str(), "Status": status_text(&container.state),
        "HostConfig": {"NetworkMode": config.network.as_str()}, "NetworkSettings": {"Networks": {}}, "Mounts": [],
    })
}

/// `Up 5 minutes (healthy)`, `Exited (0) 3 hours ago`.
fn status_text(state: &ContainerState) -> String {
    let now = Timestamp::from_system(std::time::SystemTime::now());
    match state {
        ContainerState::Created => "Created".into(),
        ContainerState::Running(running) => {
            let health = match running.health {
                HealthStatus::None => String::new(),
                HealthStatus::Starting => " (health: starting)".into(),
                HealthStatus::Healthy | HealthStatus::Unhealthy => format!(" ({})", running.health.as_str()),
            };
            format!("Up {}{health}", roughly(now.since(running.started_at)))
        }
        ContainerState::Exited(exit) => format!("Exited ({}) {} ago", exit.code, roughly(now.since(exit.finished_at))),
    }
}

fn roughly(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..=1 => "Less than a second".into(),
        2..=59 => format!("{seconds} seconds"),
        60..=119 => "About a minute".into(),
        120..=3599 => format!("{} minutes", seconds / 60),
        3600..=7199 => "About an hour".into(),
        7200..=172_799 => format!("{} hours", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

pub(super) async fn inspect(state: State, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let container = state.engine.inspect(&id)?;
    let config = &container.config;
    let command = config.command();
    let bindings: serde_json::Map<String, Value> = ports(&container.state)
        .iter()
        .map(|port| {
            let key = format!("{}/{}", port.container_port, port.protocol.as_str());
            (key, json!([{"HostIp": "0.0.0.0", "HostPort": port.host_port.to_string()}]))
        })
        .collect();
    let address = match &container.state {
        ContainerState::Running(running) => running.address.to_string(),
        ContainerState::Created | ContainerState::Exited(_) => String::new(),
    };
    Ok(Json(json!({
        "Id": container.id, "Created": container.created, "Path": command.first(),
        "Args": command.get(1..).unwrap_or_default(), "State": state_json(&container.state),
        "Image": config.image_id, "Name": format!("/{}", config.name), "RestartCount": 0, "Driver": "overlay2",
        "Platform": "linux", "LogPath": container.log_path,
        "Config": {
            "Hostname": config.hostname, "User": config.user, "Env": config.env, "Cmd": config.args,
            "Entrypoint": config.entrypoint, "Image": familiar(&config.image), "WorkingDir": config.working_dir,
            "Labels": config.labels, "StopSignal": config.stop_signal, "Tty": false, "OpenStdin": false,
        },
        "HostConfig": {
            "NetworkMode": config.network.as_str(), "ReadonlyRootfs": config.read_only, "Init": config.init,
            "CapAdd": config.cap_add, "CapDrop": config.cap_drop, "Memory": config.limits.memory_bytes,
            "NanoCpus": config.limits.nano_cpus, "PidsLimit": config.limits.pids, "Sysctls": config.sysctls,
            "Ulimits": config.ulimits, "LogConfig": {"Type": config.log.driver.as_str(), "Config": {}},
            "AutoRemove": config.auto_remove, "PortBindings": bindings, "RestartPolicy": {"Name": "", "MaximumRetryCount": 0},
        },
        "NetworkSettings": {"IPAddress": address, "Ports": bindings, "Networks": networks(&container)},
        "Mounts": config.mounts.iter().map(|mount| json!({"Destination": mount.target, "RW": !mount.read_only}))
            .collect::<Vec<_>>(),
    })))
}

/// Its places in networks, by the networks' ids where they are the swarm's.
fn networks(container: &Inspection) -> Value {
    let ContainerState::Running(running) = &container.state else { return json!({}) };
    match &container.config.network {
        NetworkMode::Bridge => json!({"bridge": {"IPAddress": running.address}}),
        NetworkMode::Host => json!({"host": {"IPAddress": ""}}),
        NetworkMode::None => json!({"none": {"IPAddress": ""}}),
        NetworkMode::Joined(joined) => {
            let place =
                |place: &JoinedNetwork| (place.id.clone(), json!({"NetworkID": place.id, "IPAddress": place.address}));
            Value::Object(joined.iter().map(place).collect())
        }
    }
}

fn state_json(state: &ContainerState) -> Value {
    let never = Timestamp::NEVER;
    let (pid, code, oom, error, started, finished) = match state {
        ContainerState::Created => (0, 0, false, "", never, never),
        ContainerState::Running(running) => (running.pid, 0, false, "", running.started_at, never),
        ContainerState::Exited(exit) => {
            (0, exit.code, exit.oom_killed, exit.error.as_str(), exit.started_at, exit.finished_at)
        }
    };
    let mut value = json!({
        "Status": state.as_str(), "Running": matches!(state, ContainerState::Running(_)), "Paused": false,
        "Restarting": false, "OOMKilled": oom, "Dead": false, "Pid": pid, "ExitCode": code, "Error": error,
        "StartedAt": started, "FinishedAt": finished,
    });
    let health = health_of(state);
    if health != HealthStatus::None {
        value["Health"] = json!({"Status": health.as_str(), "FailingStreak": 0, "Log": []});
    }
    value
}

pub(super) async fn logs(
    state: State,
    Path(id): Path<String>,
    Query(params): Query<LogParams>,
) -> Result<Response, ApiError> {
    let query = params.query()?;
    let lines = state.engine.logs(&id, query.options())?;
    Ok(logs::container_logs(lines, params))
}

#[derive(Deserialize)]
pub(super) struct StopQuery {
    t: Option<u64>,
}

pub(super) async fn stop(
    state: State,
    Path(id): Path<String>,
    Query(query): Query<StopQuery>,
) -> Result<StatusCode, ApiError> {
    state.engine.stop(&id, Duration::from_secs(query.t.unwrap_or(10))).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
pub(super) struct KillQuery {
    signal: Option<String>,
}

pub(super) async fn kill(
    state: State,
    Path(id): Path<String>,
    Query(query): Query<KillQuery>,
) -> Result<StatusCode, ApiError> {
    state.engine.kill(&id, query.signal.as_deref().unwrap_or("SIGKILL"))?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
pub(super) struct RemoveQuery {
    #[serde(default)]
    force: String,
}

pub(super) async fn remove(
    state: State,
    Path(id): Path<String>,
    Query(query): Query<RemoveQuery>,
) -> Result<StatusCode, ApiError> {
    state.engine.remove(&id, is_on(&query.force)).await?;
    Ok(StatusCode::NO_CONTENT)
}
