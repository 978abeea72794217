//! Following a container's output over a connection that is taken over from HTTP, and waiting for
//! its end.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, Request};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::json;
use skep_api::Timestamp;
use skep_engine::{ContainerState, Engine, Exit, LogOptions};
use tokio::io::AsyncWriteExt as _;
use tokio::sync::watch;

use crate::http::swarm::is_on;
use crate::http::{ApiError, State};
use crate::logs;

/// A frame without content, which clients pass over: only writing tells that one is gone, since they
/// close their own side as soon as they have no input.
const EMPTY_FRAME: [u8; 8] = [1, 0, 0, 0, 0, 0, 0, 0];
/// How long nothing is written to a client before it is asked whether it is there.
const QUIET_LIMIT: Duration = Duration::from_secs(5);
/// What frames of several streams in one are called.
const MULTIPLEXED: HeaderValue = HeaderValue::from_static("application/vnd.docker.multiplexed-stream");

#[derive(Deserialize)]
pub(in crate::http) struct AttachQuery {
    #[serde(default)]
    logs: String,
    #[serde(default)]
    stdout: String,
    #[serde(default)]
    stderr: String,
}

/// Sends what the container writes from now on, until it ends. Input is not taken yet.
pub(in crate::http) async fn attach(
    state: State,
    Path(id): Path<String>,
    Query(query): Query<AttachQuery>,
    request: Request,
) -> Result<Response, ApiError> {
    let container = state.engine.inspect(&id)?;
    // What was written before belongs to nobody who attaches now, unless asked for.
    let ran = !matches!(container.state, ContainerState::Created);
    let since = (ran && !is_on(&query.logs)).then(|| Timestamp::from_system(std::time::SystemTime::now()));
    let options = LogOptions {
        stdout: is_on(&query.stdout),
        stderr: is_on(&query.stderr),
        since,
        until: None,
        tail: None,
        follow: true,
    };
    let mut lines = state.engine.logs(&id, options)?;
    let upgrades = request.headers().contains_key(header::UPGRADE);
    if !upgrades {
        return Ok(logs::container_logs(lines, logs::LogParams::default()));
    }
    let upgraded = hyper::upgrade::on(request);
    let stop = state.stop.clone();
    tokio::spawn(async move {
        let Ok(upgraded) = upgraded.await else { return };
        let mut client = TokioIo::new(upgraded);
        let params = logs::LogParams::default();
        loop {
            let frame = tokio::select! {
                () = stop.cancelled() => return,
                line = lines.recv() => match line {
                    Some(line) => params.frame(&line, ""),
                    None => break,
                },
                () = tokio::time::sleep(QUIET_LIMIT) => Bytes::from_static(&EMPTY_FRAME),
            };
            if client.write_all(&frame).await.is_err() {
                return;
            }
        }
        // The client learns of the end by it.
        drop(client.shutdown().await);
    });
    let mut response = StatusCode::SWITCHING_PROTOCOLS.into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("tcp"));
    headers.insert(header::CONTENT_TYPE, MULTIPLEXED);
    Ok(response)
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
    let ended = |state: &ContainerState| match state {
        ContainerState::Exited(exit) => Some(exit.clone()),
        ContainerState::Created | ContainerState::Running(_) => None,
    };
    match condition {
        Condition::NotRunning => {
            state.wait_for(|state| !matches!(state, ContainerState::Running(_))).await.ok()?;
            return ended(&state.borrow());
        }
        Condition::NextExit => {
            state.wait_for(|state| ended(state).is_none()).await.ok()?;
        }
        Condition::Removed => {}
    }
    let exit = state.wait_for(|state| ended(state).is_some()).await.ok().and_then(|state| ended(&state));
    if condition == Condition::Removed {
        // The last of it is dropped when it is removed.
        while engine.inspect(id).is_ok() {
            if state.changed().await.is_err() {
                break;
            }
        }
    }
    exit
}
