//! More processes in running containers.

use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, Query, Request};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use skep_engine::{EngineError, ExecSpec, ExecState, LogSource};

use super::containers::attach::ResizeQuery;
use super::hijack::{Attached, End, Streams, parse_detach_keys};
use super::json::{JsonBody, parse, require_json};
use super::{ApiError, State};
use crate::logs::stream_frame;

/// How long a client waits for a process's end once its output is over.
const SETTLED_LIMIT: Duration = Duration::from_secs(10);
/// The largest request that starts an exec.
const START_LEN_MAX: usize = 64 << 10;

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct CreateBody {
    attach_stdin: bool,
    detach_keys: String,
    tty: bool,
    env: Vec<String>,
    cmd: Vec<String>,
    privileged: bool,
    user: String,
    working_dir: String,
    console_size: Option<[u16; 2]>,
}

pub(super) async fn create(
    state: State,
    Path(id): Path<String>,
    body: JsonBody,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let body: CreateBody = parse(&body)?;
    let detach_keys = parse_detach_keys(&body.detach_keys).ok_or_else(|| {
        ApiError::bad_request(format!(
            "Invalid detach keys ({}) provided: write such as ctrl-p,ctrl-q",
            body.detach_keys
        ))
    })?;
    let spec = ExecSpec {
        command: body.cmd,
        env: body.env,
        working_dir: body.working_dir,
        user: body.user,
        tty: body.tty,
        detach_keys,
        open_stdin: body.attach_stdin,
        privileged: body.privileged,
        terminal_size: body.console_size.filter(|_| body.tty),
    };
    let id = state.engine.create_exec(&id, spec)?;
    Ok((StatusCode::CREATED, Json(json!({"Id": id}))))
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct StartBody {
    detach: bool,
    tty: bool,
    console_size: Option<[u16; 2]>,
}

pub(super) async fn start(state: State, Path(id): Path<String>, request: Request) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let bytes = axum::body::to_bytes(body, START_LEN_MAX).await.map_err(ApiError::bad_request)?;
    if !bytes.is_empty() {
        require_json(&parts.headers)?;
    }
    let body: StartBody = parse(&bytes)?;
    let exec = state.engine.exec(&id)?;
    if body.detach {
        state.engine.start_exec(&id, body.console_size).await?;
        return Ok(StatusCode::OK.into_response());
    }
    // What is wrong with the request is told as an error; what is wrong with the program, where its
    // output would be.
    state.engine.require_startable(&exec)?;
    // A client that did not say that it has a terminal wants frames, whatever the process has.
    let tty = body.tty;
    let streams = Streams {
        tty,
        stdin: exec.spec.open_stdin,
        stdout: true,
        stderr: true,
        stdin_ends: true,
        detach_keys: if exec.spec.tty { exec.spec.detach_keys.clone() } else { Vec::new() },
        before: Vec::new(),
    };
    let (engine, exec_id) = (state.engine.clone(), exec.id.clone());
    // It begins once the client listens: some lose what comes with the answer's headers.
    let attaching = Box::pin(async move {
        match engine.start_exec(&exec_id, body.console_size).await {
            Ok(attachment) => Attached::To(attachment),
            Err(error) => {
                let reason = match error {
                    EngineError::Start { reason, .. } => reason,
                    other => skep_api::with_causes(&other),
                };
                let text = format!("OCI runtime exec failed: {reason}\r\n").into_bytes();
                Attached::Instead(if tty { text.into() } else { stream_frame(LogSource::Stderr, &text) })
            }
        }
    });
    let (engine, exec_id) = (state.engine.clone(), exec.id.clone());
    let settled = move |end| async move {
        if end == End::Output {
            // Clients ask for the exit code next; they are not kept by one that does not end.
            drop(tokio::time::timeout(SETTLED_LIMIT, engine.wait_exec(&exec_id)).await);
        }
    };
    Ok(streams.serve(state.0, Request::from_parts(parts, Body::empty()), attaching, settled))
}

pub(super) async fn inspect(state: State, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let exec = state.engine.exec(&id)?;
    let (running, pid, code) = match exec.state() {
        ExecState::Created => (false, 0, None),
        ExecState::Running { pid } => (true, pid, None),
        ExecState::Exited { code, pid } => (false, pid, Some(code)),
    };
    let spec = &exec.spec;
    Ok(Json(json!({
        "ID": exec.id, "ContainerID": exec.container, "Running": running, "Pid": pid, "ExitCode": code,
        "CanRemove": code.is_some(), "DetachKeys": "", "OpenStdin": spec.open_stdin, "OpenStdout": true,
        "OpenStderr": true,
        "ProcessConfig": {
            "entrypoint": spec.command.first(), "arguments": spec.command.get(1..).unwrap_or_default(),
            "tty": spec.tty, "privileged": spec.privileged, "user": spec.user,
        },
    })))
}

pub(super) async fn resize(
    state: State,
    Path(id): Path<String>,
    Query(query): Query<ResizeQuery>,
) -> Result<StatusCode, ApiError> {
    let (rows, columns) = query.size();
    state.engine.resize_exec(&id, rows, columns).await?;
    Ok(StatusCode::OK)
}
