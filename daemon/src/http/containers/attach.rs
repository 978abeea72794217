//! Being attached to a container's streams, and waiting for its end.

use std::convert::Infallible;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, Request};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use serde::Deserialize;
use serde_json::json;
use skep_engine::{ContainerState, Engine, Exit, LogOptions};
use tokio::sync::watch;

use crate::http::hijack::{Attached, Attaching, End, Streams, parse_detach_keys};
use crate::http::swarm::is_on;
use crate::http::{ApiError, State};
use crate::logs::stream_frame;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[derive(Default)]
pub(in crate::http) struct AttachQuery {
    logs: String,
    stream: String,
    pub(super) stdin: String,
    pub(super) stdout: String,
    pub(super) stderr: String,
    detach_keys: String,
}

/// Connects a client with the container's streams: at once if it runs, else as it starts.
pub(in crate::http) async fn attach(
    state: State,
    Path(id): Path<String>,
    Query(query): Query<AttachQuery>,
    request: Request,
) -> Result<Response, ApiError> {
    let container = state.engine.inspect(&id)?;
    if let ContainerState::Running(running) = &container.state
        && running.paused
    {
        return Err(ApiError::conflict(format!("container {id} is paused: unpause it before you attach")));
    }
    let config = &container.config;
    let detach_keys = parse_detach_keys(&query.detach_keys).ok_or_else(|| {
        ApiError::bad_request(format!(
            "Invalid detach keys ({}) provided: write such as ctrl-p,ctrl-q",
            query.detach_keys
        ))
    })?;
    let ended = matches!(container.state, ContainerState::Exited(_));
    // One that has ended has nothing to say but what it said.
    let only_logs = is_on(&query.logs) && (ended || !is_on(&query.stream));
    let so_far = if is_on(&query.logs) { so_far(&state.engine, &id, &query, config.tty).await? } else { Vec::new() };
    let mut before = Vec::new();
    let attaching: Attaching = if only_logs {
        let told = Bytes::from(so_far.concat());
        Box::pin(async move { Attached::Instead(told) })
    } else {
        before = so_far;
        let attachment = state.engine.attach(&id)?;
        Box::pin(async move {
            // The start may fail; then there is nothing to tell here.
            attachment.await.map_or_else(|_| Attached::Instead(Bytes::new()), Attached::To)
        })
    };
    let streams = Streams {
        tty: config.tty,
        stdin: is_on(&query.stdin) && config.open_stdin,
        stdout: is_on(&query.stdout),
        stderr: is_on(&query.stderr),
        stdin_ends: config.stdin_once,
        detach_keys: if config.tty { detach_keys } else { Vec::new() },
        before,
    };
    let (engine, id) = (state.engine.clone(), container.id);
    let detached = move |end| async move {
        if end == End::Detached {
            engine.tell_detached(&id);
        }
    };
    Ok(streams.serve(state.0, request, attaching, detached))
}

/// What the container has written until now.
async fn so_far(engine: &Engine, id: &str, query: &AttachQuery, tty: bool) -> Result<Vec<Bytes>, ApiError> {
    let options = LogOptions {
        stdout: is_on(&query.stdout),
        stderr: is_on(&query.stderr),
        since: None,
        until: None,
        tail: None,
        follow: false,
    };
    let mut lines = engine.logs(id, options)?;
    let mut before = Vec::new();
    while let Some(line) = lines.recv().await {
        let text = line.text.into_bytes();
        before.push(if tty { text.into() } else { stream_frame(line.stream, &text) });
    }
    Ok(before)
}

#[derive(Deserialize)]
pub(in crate::http) struct ResizeQuery {
    h: u16,
    w: u16,
}

impl ResizeQuery {
    pub(in crate::http) fn size(&self) -> (u16, u16) {
        (self.h, self.w)
    }
}

pub(in crate::http) async fn resize(
    state: State,
    Path(id): Path<String>,
    Query(query): Query<ResizeQuery>,
) -> Result<StatusCode, ApiError> {
    let (rows, columns) = query.size();
    state.engine.resize(&id, rows, columns).await?;
    Ok(StatusCode::OK)
}

#[derive(Deserialize)]
pub(in crate::http) struct WaitQuery {
    #[serde(default)]
    condition: String,
}

/// Answers at once, and says how the container ended when it has: clients start it in between.
pub(in crate::http) async fn wait(
    state: State,
    Path(id): Path<String>,
    Query(query): Query<WaitQuery>,
) -> Result<Response, ApiError> {
    let condition = match query.condition.as_str() {
        "" | "not-running" => Condition::NotRunning,
        "next-exit" => Condition::NextExit,
        "removed" => Condition::Removed,
        other => {
            return Err(ApiError::bad_request(format!(
                "invalid condition: {other:?}; use not-running, next-exit or removed"
            )));
        }
    };
    let id = state.engine.inspect(&id)?.id;
    let watched = state.engine.watch(&id)?;
    let engine = state.engine.clone();
    let end = async move {
        let exit = await_end(&engine, &id, watched, condition).await;
        let (code, error) = exit.map_or((0, None), |exit| (exit.code, Some(exit.error)));
        let error = error.filter(|text| !text.is_empty()).map(|text| json!({"Message": text}));
        Ok::<_, Infallible>(Bytes::from(json!({"StatusCode": code, "Error": error}).to_string() + "\n"))
    };
    let body = Body::from_stream(futures::stream::once(end));
    Ok(([(header::CONTENT_TYPE, "application/json")], body).into_response())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Condition {
    NotRunning,
    NextExit,
    Removed,
}

/// Waits; `None` if the container is gone before it ran.
async fn await_end(
    engine: &Arc<Engine>,
    id: &str,
    mut state: watch::Receiver<ContainerState>,
    condition: Condition,
) -> Option<Exit> {
    let exit_of = |state: &ContainerState| match state {
        ContainerState::Restarting(exit) | ContainerState::Exited(exit) => Some(exit.clone()),
        ContainerState::Created | ContainerState::Running(_) => None,
    };
    let is_at_rest = |state: &ContainerState| match state {
        ContainerState::Created | ContainerState::Exited(_) => true,
        ContainerState::Running(_) | ContainerState::Restarting(_) => false,
    };
    match condition {
        Condition::NotRunning => {
            if is_at_rest(&state.borrow()) {
                return exit_of(&state.borrow());
            }
            // One that is to be started again has ended, too; one that waits for it ends once more.
            state.wait_for(|state| !matches!(state, ContainerState::Restarting(_))).await.ok()?;
            return state.wait_for(|state| exit_of(state).is_some()).await.ok().and_then(|state| exit_of(&state));
        }
        Condition::NextExit => {
            state.wait_for(|state| exit_of(state).is_none()).await.ok()?;
        }
        Condition::Removed => {}
    }
    if condition == Condition::NextExit {
        return state.wait_for(|state| exit_of(state).is_some()).await.ok().and_then(|state| exit_of(&state));
    }
    // Its last end before it is gone.
    let mut exit = exit_of(&state.borrow_and_update());
    // The last of it is dropped when it is removed.
    while engine.inspect(id).is_ok() && state.changed().await.is_ok() {
        exit = exit_of(&state.borrow_and_update()).or(exit);
    }
    exit
}
