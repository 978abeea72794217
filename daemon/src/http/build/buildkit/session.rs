//! Sessions: connections over which clients serve their files and secrets to builds.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::http::{HeaderMap, Request, Response, Uri};
use futures::future::BoxFuture;
use hyper::body::Incoming;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use skep_api::SecretBytes;
use skep_api::buildkit::secrets::GetSecretRequest;
use skep_api::buildkit::secrets::secrets_client::SecretsClient;
use skep_api::buildkit::session::CredentialsRequest;
use skep_api::buildkit::session::auth_client::AuthClient;
use skep_api::buildkit::ssh::ssh_client::SshClient;
use skep_api::buildkit::ssh::{BytesMessage, CheckAgentRequest};
use skep_engine::{Credentials, Lender, Lending};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};
use tower::Service;

/// How long a client may take to open its session once it has asked for a build, which it does at the same time.
const OPENING_LIMIT: Duration = Duration::from_secs(10);
/// A client that does not answer this for as long again is gone.
pub(super) const QUIET_LIMIT: Duration = Duration::from_secs(30);
/// Bytes under way of one file or call.
pub(super) const WINDOW_LEN: u32 = 1 << 20;
const AGENT_PIECE_LEN: usize = 16 << 10;
const AGENT_PIECES_AHEAD: usize = 4;
/// Sessions that are open at a time.
const SESSIONS_MAX: usize = 1000;

/// The sessions that are open, by the ids that clients gave them.
#[derive(Default)]
pub(super) struct Sessions {
    open: Mutex<HashMap<String, Session>>,
    changed: watch::Sender<()>,
}

/// One client.
#[derive(Clone)]
pub(super) struct Session {
    channel: Channel,
    /// Says which directories are the same as another time.
    pub(super) shared_key: Arc<str>,
    /// What it serves, such as `/moby.filesync.v1.FileSync/DiffCopy`, in lower case.
    methods: Arc<[String]>,
}

impl Sessions {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Session>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves a session until its connection ends.
    pub(super) async fn hold(&self, id: String, headers: &HeaderMap, connection: hyper::upgrade::Upgraded) {
        let builder = handshake_settings();
        let Ok((sender, running)) = builder.handshake(connection).await else { return };
        let methods = headers.get_all("x-docker-expose-session-grpc-method").iter();
        let methods = methods.filter_map(|method| method.to_str().ok()).map(str::to_lowercase).collect();
        let shared_key = headers.get("x-docker-expose-session-sharedkey").and_then(|key| key.to_str().ok());
        let session = Session { channel: Channel(sender), shared_key: shared_key.unwrap_or_default().into(), methods };
        {
            let mut open = self.lock();
            if open.len() >= SESSIONS_MAX || open.contains_key(&id) {
                tracing::warn!(session = %id, "a build's session was refused: it is open already, or too many are");
                return;
            }
            open.insert(id.clone(), session);
        }
        self.changed.send_replace(());
        if let Err(error) = running.await {
            tracing::debug!(session = %id, %error, "a build's session broke off");
        }
        self.lock().remove(&id);
    }

    /// A client's session, which may be about to come.
    pub(super) async fn get(&self, id: &str) -> Result<Session, Status> {
        // Several builds of one session tell themselves apart by what stands before.
        let id = id.rsplit(':').next().unwrap_or(id);
        let mut changed = self.changed.subscribe();
        let opened = async {
            loop {
                if let Some(session) = self.lock().get(id) {
                    return session.clone();
                }
                if changed.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        let late = |_| Status::failed_precondition(format!("no active session for {id}: its client opened none"));
        tokio::time::timeout(OPENING_LIMIT, opened).await.map_err(late)
    }
}

fn handshake_settings() -> hyper::client::conn::http2::Builder<TokioExecutor> {
    let mut builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
    builder.timer(TokioTimer::new()).keep_alive_interval(QUIET_LIMIT).keep_alive_timeout(QUIET_LIMIT);
    builder.initial_stream_window_size(WINDOW_LEN).initial_connection_window_size(4 * WINDOW_LEN);
    builder
}

impl Session {
    /// Whether the client serves a method; some do not say what they serve.
    pub(super) fn serves(&self, method: &str) -> bool {
        self.methods.is_empty() || self.methods.iter().any(|served| served.eq_ignore_ascii_case(method))
    }

    pub(super) fn channel(&self) -> (Channel, Uri) {
        (self.channel.clone(), Uri::from_static("http://session"))
    }

    async fn ask_secret(&self, id: &str) -> Result<Option<SecretBytes>, String> {
        if !self.serves("/moby.buildkit.secrets.v1.Secrets/GetSecret") {
            return Ok(None);
        }
        let (channel, origin) = self.channel();
        let asked =
            SecretsClient::with_origin(channel, origin).get_secret(GetSecretRequest { id: id.to_owned() }).await;
        match asked {
            Ok(answer) => Ok(Some(SecretBytes::new(answer.into_inner().data))),
            Err(status) if matches!(status.code(), Code::NotFound | Code::Unimplemented) => Ok(None),
            Err(status) => Err(format!("the client did not give it: {}", status.message())),
        }
    }

    async fn ask_credentials(&self, registry: &str) -> Credentials {
        if !self.serves("/moby.filesync.v1.Auth/Credentials") {
            return Credentials::default();
        }
        // Under this name clients keep what they log in with there.
        let host = if registry == "docker.io" { "registry-1.docker.io" } else { registry };
        let (channel, origin) = self.channel();
        let request = CredentialsRequest { host: host.to_owned() };
        match AuthClient::with_origin(channel, origin).credentials(request).await.map(tonic::Response::into_inner) {
            Ok(answer) if answer.secret.is_empty() => Credentials::default(),
            Ok(answer) if answer.username.is_empty() => Credentials::Token(SecretBytes::new(answer.secret.into())),
            Ok(answer) => {
                Credentials::Basic { username: answer.username, password: SecretBytes::new(answer.secret.into()) }
            }
            Err(status) => {
                tracing::info!(registry, %status, "a build's client did not say what to log in with");
                Credentials::default()
            }
        }
    }
}

impl Session {
    async fn check_agent(&self, id: &str) -> bool {
        if !self.serves("/moby.sshforward.v1.SSH/ForwardAgent") {
            return false;
        }
        let (channel, origin) = self.channel();
        SshClient::with_origin(channel, origin).check_agent(CheckAgentRequest { id: id.to_owned() }).await.is_ok()
    }

    async fn forward_agent(&self, id: &str, connection: UnixStream) -> Result<(), Status> {
        let (mut from_step, mut to_step) = connection.into_split();
        let (pieces, coming) = mpsc::channel(AGENT_PIECES_AHEAD);
        let mut request = tonic::Request::new(ReceiverStream::new(coming));
        let id = id.parse().map_err(|_| Status::invalid_argument(format!("{id:?} is no agent")))?;
        request.metadata_mut().insert("buildkit.ssh.id", id);
        let (channel, origin) = self.channel();
        let asking = async move {
            let mut buffer = vec![0; AGENT_PIECE_LEN];
            while let Ok(len @ 1..) = from_step.read(&mut buffer).await {
                if pieces.send(BytesMessage { data: buffer[..len].to_vec() }).await.is_err() {
                    return;
                }
            }
        };
        let answering = async move {
            // The client says nothing before it has something to answer.
            let mut answers = SshClient::with_origin(channel, origin).forward_agent(request).await?.into_inner();
            while let Some(answer) = answers.message().await? {
                // A step that has ended waits for no answer.
                if to_step.write_all(&answer.data).await.is_err() {
                    break;
                }
            }
            Ok(())
        };
        tokio::join!(asking, answering).1
    }
}

impl Lender for Session {
    fn secret<'a>(&'a self, id: &'a str) -> Lending<'a, Result<Option<SecretBytes>, String>> {
        Box::pin(self.ask_secret(id))
    }

    fn credentials<'a>(&'a self, registry: &'a str) -> Lending<'a, Credentials> {
        Box::pin(self.ask_credentials(registry))
    }

    fn has_agent<'a>(&'a self, id: &'a str) -> Lending<'a, bool> {
        Box::pin(self.check_agent(id))
    }

    fn connect_agent<'a>(&'a self, id: &'a str, connection: UnixStream) -> Lending<'a, ()> {
        Box::pin(async move {
            if let Err(status) = self.forward_agent(id, connection).await {
                tracing::info!(agent = %id, %status, "a build's connection to its client's SSH agent broke off");
            }
        })
    }
}

/// A connection as generated clients want it.
#[derive(Clone)]
pub(super) struct Channel(SendRequest<tonic::body::Body>);

impl Service<Request<tonic::body::Body>> for Channel {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = BoxFuture<'static, hyper::Result<Response<Incoming>>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<hyper::Result<()>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}
