//! Builds for clients with BuildKit, as `docker build` with buildx and Compose are.
//!
//! Such a client opens two connections and takes both over from HTTP. On `/grpc` the daemon serves BuildKit's API: the
//! build is asked for and followed there. On `/session` the client serves: files, secrets, what it logs in with. The
//! Dockerfile is built by the same builder as all others.

mod control;
mod directories;
mod files;
mod gateway;
mod job;
mod output;
mod over_http;
mod progress;
mod request;
mod session;

use std::path::Path;
use std::sync::Arc;

use axum::extract::Request;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use hyper_util::service::TowerToHyperService;
use skep_api::buildkit::control_server::ControlServer;
use skep_api::buildkit::frontend::llb_bridge_server::LlbBridgeServer;
use skep_engine::{Engine, EngineError};
use tonic::service::Routes;

pub(super) use self::over_http::build;

use self::directories::Directories;
use self::job::Jobs;
use self::session::{QUIET_LIMIT, Sessions, WINDOW_LEN};
use crate::daemon::Daemon;
use crate::http::{ApiError, State};

const PROTOCOL: HeaderValue = HeaderValue::from_static("h2c");
/// The largest call: build arguments and labels are in it.
const CALL_LEN_MAX: usize = 16 << 20;

/// What is known of such clients.
pub(crate) struct BuildKit {
    sessions: Sessions,
    jobs: Jobs,
    directories: Directories,
}

impl BuildKit {
    /// What is kept of clients' directories is kept below `data_root`.
    pub(crate) fn new(data_root: &Path) -> Self {
        let directories = Directories::new(data_root.join("build-contexts"));
        Self { sessions: Sessions::default(), jobs: Jobs::default(), directories }
    }

    /// Removes what builds left that no image has; returns how many bytes that were.
    pub(super) fn prune(&self, engine: &Engine) -> Result<u64, EngineError> {
        Ok(engine.prune_builds()? + self.directories.prune())
    }

    /// What is kept of clients' directories, and its bytes.
    pub(in crate::http) fn usage(&self) -> Vec<(String, u64)> {
        self.directories.usage()
    }
}

/// What serves a client.
#[derive(Clone)]
struct Served {
    daemon: Arc<Daemon>,
}

impl Served {
    fn kit(&self) -> &BuildKit {
        &self.daemon.build_kit
    }
}

/// Takes a connection over from HTTP.
fn take_over(request: Request) -> Result<(OnUpgrade, Response), ApiError> {
    match request.headers().get(header::UPGRADE) {
        Some(protocol) if protocol == PROTOCOL => {}
        Some(other) => {
            return Err(ApiError::bad_request(format!("protocol {other:?} is not supported: upgrade to h2c")));
        }
        None => return Err(ApiError::bad_request("no upgrade is asked for: BuildKit's clients upgrade to h2c")),
    }
    let mut response = StatusCode::SWITCHING_PROTOCOLS.into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, PROTOCOL);
    Ok((hyper::upgrade::on(request), response))
}

/// Serves BuildKit's API.
pub(in crate::http) async fn grpc(state: State, request: Request) -> Result<Response, ApiError> {
    let (upgrade, response) = take_over(request)?;
    let daemon = state.0;
    tokio::spawn(async move {
        if let Ok(connection) = upgrade.await {
            serve(daemon, connection).await;
        }
    });
    Ok(response)
}

async fn serve(daemon: Arc<Daemon>, connection: Upgraded) {
    let served = Served { daemon: daemon.clone() };
    let control = ControlServer::new(served.clone()).max_decoding_message_size(CALL_LEN_MAX);
    let gateway = LlbBridgeServer::new(served).max_decoding_message_size(CALL_LEN_MAX);
    let routes = TowerToHyperService::new(Routes::new(control).add_service(gateway).prepare());
    let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    builder.timer(TokioTimer::new()).keep_alive_interval(QUIET_LIMIT).keep_alive_timeout(QUIET_LIMIT);
    builder.initial_stream_window_size(WINDOW_LEN);
    tokio::select! {
        () = daemon.stop.cancelled() => {}
        served = builder.serve_connection(connection, routes) => if let Err(error) = served {
            tracing::debug!(%error, "a connection of BuildKit's API broke off");
        },
    }
}

/// Takes what a client serves.
pub(in crate::http) async fn session(state: State, request: Request) -> Result<Response, ApiError> {
    let headers = request.headers().clone();
    let (upgrade, response) = take_over(request)?;
    let id = headers.get("x-docker-expose-session-uuid").and_then(|id| id.to_str().ok()).map(str::to_owned);
    let id = id.ok_or_else(|| ApiError::bad_request("X-Docker-Expose-Session-Uuid is missing: a session has an id"))?;
    let daemon = state.0;
    tokio::spawn(async move {
        let Ok(connection) = upgrade.await else { return };
        tokio::select! {
            () = daemon.stop.cancelled() => {}
            () = daemon.build_kit.sessions.hold(id, &headers, connection) => {}
        }
    });
    Ok(response)
}
