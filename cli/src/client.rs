//! A client of the Engine API.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::http::request::Builder;
use hyper::upgrade::Upgraded;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;

use crate::context::{self, ContextStore};
use crate::credentials::Config;
use crate::endpoint::{Endpoint, Stream, TlsFiles};
use crate::pipes::{Body, whole};

pub(crate) use skep_api::escape;

pub(crate) const DEFAULT_HOST: &str = "unix:///run/skep/skep.sock";
const API: &str = "/v1.50";

/// Which daemon to talk to. What is said here comes before what the environment says.
#[derive(clap::Args)]
pub(crate) struct Target {
    /// Daemon to talk to: unix://PATH, tcp://HOST:PORT or ssh://[USER@]HOST [env: SKEP_HOST, DOCKER_HOST]
    #[arg(short = 'H', long, value_name = "SOCKET")]
    pub(crate) host: Option<String>,
    /// Named daemon to talk to: see 'skep context' [env: SKEP_CONTEXT, DOCKER_CONTEXT]
    #[arg(short, long, value_name = "NAME")]
    context: Option<String>,
    /// Where credentials and contexts are kept [env: DOCKER_CONFIG] [default: ~/.docker]
    #[arg(long, value_name = "DIR")]
    pub(crate) config: Option<PathBuf>,
    /// Of no effect: the client has nothing more to tell
    #[arg(short = 'D', long, hide = true)]
    debug: bool,
    #[arg(short, long, hide = true)]
    log_level: Option<String>,
    /// Speak TLS on TCP, with any daemon
    #[arg(long)]
    tls: bool,
    /// Speak TLS on TCP, with a daemon of our CA's alone [env: DOCKER_TLS_VERIFY, DOCKER_CERT_PATH]
    #[arg(long)]
    tlsverify: bool,
    /// Certificate of the CA that the daemon's is from [default: ~/.docker/ca.pem]
    #[arg(long, value_name = "FILE")]
    tlscacert: Option<PathBuf>,
    /// Our own certificate [default: ~/.docker/cert.pem]
    #[arg(long, value_name = "FILE")]
    tlscert: Option<PathBuf>,
    /// Its key [default: ~/.docker/key.pem]
    #[arg(long, value_name = "FILE")]
    tlskey: Option<PathBuf>,
}

/// What the environment says of the daemon's place.
pub(crate) fn host_from_environment() -> Option<String> {
    from_environment(&["SKEP_HOST", "DOCKER_HOST"])
}

fn from_environment(names: &[&str]) -> Option<String> {
    names.iter().find_map(|name| std::env::var(name).ok()).filter(|value| !value.is_empty())
}

impl Target {
    /// The name of the context in force.
    pub(crate) fn context(&self) -> anyhow::Result<String> {
        match (&self.context, &self.host) {
            (Some(_), Some(_)) => bail!("conflicting options: --host and --context both say where the daemon is"),
            (Some(context), None) => return Ok(context.clone()),
            (None, Some(_)) => return Ok(context::DEFAULT.to_owned()),
            (None, None) => {}
        }
        if host_from_environment().is_some() {
            return Ok(context::DEFAULT.to_owned());
        }
        let configured = || Config::load().ok()?.context().map(str::to_owned);
        let named = from_environment(&["SKEP_CONTEXT", "DOCKER_CONTEXT"]).or_else(configured);
        Ok(named.unwrap_or_else(|| context::DEFAULT.to_owned()))
    }

    fn endpoint(&self) -> anyhow::Result<Endpoint> {
        let name = self.context()?;
        if name != context::DEFAULT {
            let context = ContextStore::open()?.find(&name)?;
            return Endpoint::parse(&context.host, context.tls().as_ref());
        }
        let host = self.host.clone().or_else(host_from_environment).unwrap_or_else(|| DEFAULT_HOST.to_owned());
        Endpoint::parse(&host, self.tls()?.as_ref())
    }

    fn tls(&self) -> anyhow::Result<Option<TlsFiles>> {
        let verify = self.tlsverify || from_environment(&["DOCKER_TLS_VERIFY"]).is_some();
        if !verify && !self.tls {
            return Ok(None);
        }
        let dir = from_environment(&["DOCKER_CERT_PATH"]).map(PathBuf::from);
        let usual = TlsFiles::in_dir(&dir.map_or_else(Config::dir, Ok)?);
        Ok(Some(TlsFiles {
            ca: self.tlscacert.clone().or(usual.ca),
            cert: self.tlscert.clone().or(usual.cert),
            key: self.tlskey.clone().or(usual.key),
            skip_verify: !verify,
        }))
    }
}

/// A connection to the daemon, made anew for each request.
pub(crate) struct Client {
    endpoint: Endpoint,
}

impl Client {
    pub(crate) fn new(target: &Target) -> anyhow::Result<Self> {
        Ok(Self { endpoint: target.endpoint()? })
    }

    /// The daemon's socket, if it is on this host.
    pub(crate) fn socket(&self) -> Option<&Path> {
        self.endpoint.socket()
    }

    /// Bytes to and from the daemon, as they are.
    pub(crate) async fn dial(&self) -> anyhow::Result<Box<dyn Stream>> {
        self.endpoint.connect().await
    }

    /// Sends a request; an error answer becomes an error.
    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<Response<Incoming>> {
        let request = Request::builder().method(method).header("content-type", "application/json");
        self.send_request(request, path, whole(body.map(Value::to_string).unwrap_or_default())).await
    }

    /// As [`send`](Self::send), with an archive for a body.
    pub(crate) async fn send_archive(&self, path: &str, archive: Body) -> anyhow::Result<Response<Incoming>> {
        let request = Request::builder().method(Method::POST).header("content-type", "application/x-tar");
        self.send_request(request, path, archive).await
    }

    /// As [`send`](Self::send), with any headers and body.
    pub(crate) async fn send_request(
        &self,
        request: Builder,
        path: &str,
        body: Body,
    ) -> anyhow::Result<Response<Incoming>> {
        let response = self.try_send(request, path, body).await?;
        if response.status().is_success() || response.status() == StatusCode::NOT_MODIFIED {
            return Ok(response);
        }
        Err(refusal(response).await?)
    }

    /// Sends a request after which the connection is no HTTP any more.
    pub(crate) async fn upgrade(&self, path: &str, body: &Value) -> anyhow::Result<Upgraded> {
        let request = Request::builder()
            .method(Method::POST)
            .header("content-type", "application/json")
            .header("connection", "Upgrade")
            .header("upgrade", "tcp");
        let response = self.try_send(request, path, whole(body.to_string())).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(refusal(response).await?);
        }
        Ok(hyper::upgrade::on(response).await?)
    }

    async fn try_send(&self, request: Builder, path: &str, body: Body) -> anyhow::Result<Response<Incoming>> {
        let request = request.uri(format!("{API}{path}")).header("host", "skep").body(body)?;
        let exchanged = async { exchange(TokioIo::new(self.endpoint.connect().await?), request).await };
        let exchanged = exchanged.await;
        if let Err(error) = &exchanged
            && error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_user)
        {
            // What was to be sent could not be read.
            bail!("{}", error.root_cause());
        }
        exchanged.with_context(|| {
            format!(
                "the daemon at {} is not reached: is it running ('skep daemon'), and may you use its socket?",
                self.endpoint.host()
            )
        })
    }

    async fn json(&self, method: Method, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        read_json(self.send(method, path, body).await?).await
    }

    pub(crate) async fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.json(Method::GET, path, None).await
    }

    /// What is there under a path, if anything is.
    pub(crate) async fn find(&self, path: &str) -> anyhow::Result<Option<Value>> {
        match self.get(path).await {
            Ok(found) => Ok(Some(found)),
            Err(error) if is_not_found(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        self.json(Method::POST, path, Some(body)).await
    }

    pub(crate) async fn put(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        self.json(Method::PUT, path, Some(body)).await
    }

    /// A POST of JSON with our credentials for a registry, if we have any.
    pub(crate) async fn post_with_auth(
        &self,
        path: &str,
        auth: Option<String>,
        body: &Value,
    ) -> anyhow::Result<Response<Incoming>> {
        let mut request = Request::builder().method(Method::POST).header("content-type", "application/json");
        if let Some(auth) = auth {
            request = request.header("x-registry-auth", auth);
        }
        self.send_request(request, path, whole(body.to_string())).await
    }

    pub(crate) async fn delete(&self, path: &str) -> anyhow::Result<Value> {
        self.json(Method::DELETE, path, None).await
    }
}

/// Reads an answer to its end; one that has begun may take long.
pub(crate) async fn read_json(response: Response<Incoming>) -> anyhow::Result<Value> {
    let bytes = response.into_body().collect().await?.to_bytes();
    if bytes.is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_slice(&bytes).context("the daemon's answer cannot be read")
}

/// What an error answer says.
async fn refusal(response: Response<Incoming>) -> anyhow::Result<anyhow::Error> {
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    let message = serde_json::from_slice::<Value>(&body).ok();
    let message = message.and_then(|value| value["message"].as_str().map(str::to_owned));
    let message = message.unwrap_or_else(|| format!("the daemon answered {status}"));
    Ok(Refused { status, message }.into())
}

/// The daemon did not do what it was asked for.
#[derive(Debug)]
struct Refused {
    status: StatusCode,
    message: String,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Refused {}

/// Whether an error says that what it was about does not exist.
pub(crate) fn is_not_found(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Refused>().is_some_and(|refused| refused.status == StatusCode::NOT_FOUND)
}

async fn exchange<I>(io: I, request: Request<Body>) -> anyhow::Result<Response<Incoming>>
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await?;
    tokio::spawn(async move { drop(connection.with_upgrades().await) });
    Ok(sender.send_request(request).await?)
}
