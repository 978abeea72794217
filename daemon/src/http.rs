//! The Engine API over HTTP.

pub(crate) mod build;
mod containers;
mod error;
mod events;
mod exec;
mod hijack;
mod images;
mod json;
mod networks;
mod nodes;
mod payloads;
mod services;
mod stream;
mod swarm;
mod system;
mod tasks;
pub(crate) mod tls_listener;
mod volumes;

use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::http::{Method, StatusCode, Uri};
use axum::middleware::{Next, from_fn, map_response};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{any, delete, get, head, post};
use tower::Layer as _;
use tower::util::{MapRequest, MapRequestLayer};

use crate::daemon::Daemon;
pub(crate) use error::ApiError;

/// The newest version that is spoken in full; newer clients come down to it.
pub(crate) const API_VERSION: &str = "1.50";
/// The oldest and newest version a path may name.
const MINOR_MIN: u32 = 24;
const MINOR_MAX: u32 = 56;

/// The largest request body that is taken: a config may have 1 MB, in base 64.
const BODY_LEN_MAX: usize = 16 << 20;

pub(crate) type State = axum::extract::State<Arc<Daemon>>;
/// For what is removed only when it is insisted upon.
#[derive(serde::Deserialize)]
pub(crate) struct ForceQuery {
    #[serde(default)]
    force: String,
}

impl ForceQuery {
    fn is_on(&self) -> bool {
        swarm::is_on(&self.force)
    }
}

/// The minor version that a path names, for what has changed its meaning since.
#[derive(Clone, Copy)]
pub(crate) struct AskedVersion(pub(crate) u32);

type Rewritten = MapRequest<Router, fn(Request) -> Request>;

/// The service of one listener.
pub(crate) fn service(daemon: Arc<Daemon>) -> axum::routing::IntoMakeService<Rewritten> {
    let router = router()
        .layer(axum::extract::DefaultBodyLimit::max(BODY_LEN_MAX))
        .layer(map_response(system::introduce))
        .layer(from_fn(finish))
        .layer(from_fn(allow_options))
        .layer(from_fn(note))
        .layer(from_fn(stream::read_to_the_end))
        .with_state(daemon);
    let rewrite: fn(Request) -> Request = strip_version;
    axum::ServiceExt::<Request>::into_make_service(MapRequestLayer::new(rewrite).layer(router))
}

fn router() -> Router<Arc<Daemon>> {
    system_router()
        .merge(swarm_router())
        .merge(containers_router())
        .merge(images_router())
        .merge(networks_router())
        .route("/unsupported-api-version/{version}", any(system::unsupported_version))
        .fallback(unknown)
}

fn system_router() -> Router<Arc<Daemon>> {
    Router::new()
        .route("/_ping", get(system::ping))
        .route("/_ping", head(system::ping))
        .route("/version", get(system::version))
        .route("/info", get(system::info))
        .route("/system/df", get(system::disk_usage))
        .route("/auth", post(images::auth))
        .route("/events", get(events::events))
        .route("/plugins", get(system::plugins))
        .route("/skep/diagnose", get(networks::diagnose::diagnose))
}

fn swarm_router() -> Router<Arc<Daemon>> {
    Router::new()
        .route("/swarm", get(swarm::inspect))
        .route("/swarm/init", post(swarm::init))
        .route("/swarm/join", post(swarm::join))
        .route("/swarm/leave", post(swarm::leave))
        .route("/swarm/update", post(swarm::update))
        .route("/swarm/unlockkey", get(swarm::unlock_key))
        .route("/swarm/unlock", post(swarm::unlock))
        .route("/nodes", get(nodes::list))
        .route("/nodes/{id}", get(nodes::inspect).delete(nodes::remove))
        .route("/nodes/{id}/update", post(nodes::update))
        .route("/services", get(services::list))
        .route("/services/create", post(services::create))
        .route("/services/{id}", get(services::inspect).delete(services::remove))
        .route("/services/{id}/update", post(services::update))
        .route("/services/{id}/logs", get(services::logs))
        .route("/tasks", get(tasks::list))
        .route("/tasks/{id}", get(tasks::inspect))
        .route("/tasks/{id}/logs", get(tasks::logs))
        .route("/secrets", get(payloads::list_secrets))
        .route("/secrets/create", post(payloads::create_secret))
        .route("/secrets/{id}", get(payloads::inspect_secret).delete(payloads::remove_secret))
        .route("/secrets/{id}/update", post(payloads::update_secret))
        .route("/configs", get(payloads::list_configs))
        .route("/configs/create", post(payloads::create_config))
        .route("/configs/{id}", get(payloads::inspect_config).delete(payloads::remove_config))
        .route("/configs/{id}/update", post(payloads::update_config))
}

fn containers_router() -> Router<Arc<Daemon>> {
    Router::new()
        .route("/containers/json", get(containers::list))
        .route("/containers/create", post(containers::create::create))
        .route("/containers/prune", post(containers::change::prune))
        .route("/containers/{id}", delete(containers::change::remove))
        .route("/containers/{id}/json", get(containers::inspect))
        .route("/containers/{id}/logs", get(containers::logs))
        .route("/containers/{id}/start", post(containers::change::start))
        .route("/containers/{id}/stop", post(containers::change::stop))
        .route("/containers/{id}/restart", post(containers::change::restart))
        .route("/containers/{id}/kill", post(containers::change::kill))
        .route("/containers/{id}/pause", post(containers::change::pause))
        .route("/containers/{id}/unpause", post(containers::change::unpause))
        .route("/containers/{id}/rename", post(containers::change::rename))
        .route("/containers/{id}/update", post(containers::change::update))
        .route("/containers/{id}/wait", post(containers::attach::wait))
        .route("/containers/{id}/attach", post(containers::attach::attach))
        .route("/containers/{owner}/{alias}", delete(containers::change::remove_link).fallback(unknown))
        .route("/containers/{id}/attach/ws", get(containers::websocket::attach))
        .route("/containers/{id}/resize", post(containers::attach::resize))
        .route("/containers/{id}/top", get(containers::watch::top))
        .route("/containers/{id}/stats", get(containers::watch::stats))
        .route("/containers/{id}/exec", post(exec::create))
        .route("/containers/{id}/changes", get(containers::files::changes))
        .route("/containers/{id}/export", get(containers::files::export))
        .route(
            "/containers/{id}/archive",
            get(containers::files::get).head(containers::files::stat).put(containers::files::put),
        )
        .route("/exec/{id}/start", post(exec::start))
        .route("/exec/{id}/json", get(exec::inspect))
        .route("/exec/{id}/resize", post(exec::resize))
        .route("/volumes", get(volumes::list))
        .route("/volumes/create", post(volumes::create))
        .route("/volumes/prune", post(volumes::prune))
        .route("/volumes/{name}", get(volumes::inspect).put(volumes::update).delete(volumes::remove))
}

fn images_router() -> Router<Arc<Daemon>> {
    Router::new()
        .route("/images/json", get(images::list))
        .route("/images/create", post(images::create))
        .route("/images/load", post(images::load))
        .route("/images/get", get(images::save_several))
        .route("/images/prune", post(images::prune))
        .route("/images/{*rest}", get(images::get).post(images::post).delete(images::remove))
        .route("/build", post(build::build))
        .route("/build/prune", post(build::prune))
        .route("/grpc", post(build::buildkit::grpc))
        .route("/session", post(build::buildkit::session))
        .route("/commit", post(containers::files::commit))
        .route("/distribution/{*rest}", get(images::distribution))
}

fn networks_router() -> Router<Arc<Daemon>> {
    Router::new()
        .route("/networks", get(networks::list))
        .route("/networks/", get(networks::list))
        .route("/networks/create", post(networks::create::create))
        .route("/networks/prune", post(networks::prune))
        .route("/networks/{id}", get(networks::inspect).delete(networks::remove))
        .route("/networks/{id}/connect", post(networks::joining::connect))
        .route("/networks/{id}/disconnect", post(networks::joining::disconnect))
}

/// Finishes what a request has begun though its client goes: a container that was to be stopped is stopped.
async fn finish(request: Request, next: Next) -> Response {
    let only_looks = matches!(*request.method(), Method::GET | Method::HEAD) || request.uri().path().ends_with("/wait");
    if only_looks {
        return next.run(request).await;
    }
    match tokio::spawn(next.run(request)).await {
        Ok(response) => response,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => ApiError::internal("the daemon is on its way down: try again when it is back").into_response(),
        },
    }
}

/// What the Engine API has beside the paths that are served.
const UNSUPPORTED: [&str; 2] = ["/plugins/", "/checkpoints"];

async fn unknown(uri: Uri) -> ApiError {
    let path = uri.path();
    if UNSUPPORTED.iter().any(|known| path.contains(known)) {
        return ApiError::unsupported(format!("{path} is not supported yet by this version of skep"));
    }
    ApiError::not_found("page not found")
}

/// Says in the log what is asked, for those who want to know.
async fn note(request: Request, next: Next) -> Response {
    tracing::debug!("Calling {} {}", request.method(), request.uri().path());
    next.run(request).await
}

/// Answers those who ask what may be asked of a path, as browsers do.
async fn allow_options(request: Request, next: Next) -> Response {
    if request.method() == Method::OPTIONS {
        return StatusCode::OK.into_response();
    }
    next.run(request).await
}

/// Takes `/v1.N` off the path; a version that is not spoken gets an answer that says so.
fn strip_version(mut request: Request) -> Request {
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
    let Some((version, rest)) = path.strip_prefix("/v1.").and_then(|rest| rest.split_once('/')) else {
        return request;
    };
    let Ok(minor) = version.parse::<u32>() else { return request };
    let asked = AskedVersion(minor);
    let target = if (MINOR_MIN..=MINOR_MAX).contains(&minor) {
        format!("/{rest}")
    } else {
        format!("/unsupported-api-version/1.{minor}")
    };
    if let Ok(uri) = target.parse() {
        *request.uri_mut() = uri;
    }
    request.extensions_mut().insert(asked);
    request
}
