//! A client of the Engine API.

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::http::request::Builder;
use hyper::upgrade::Upgraded;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::{TcpStream, UnixStream};

const DEFAULT_HOST: &str = "unix:///run/skep/skep.sock";
const API: &str = "/v1.50";

/// Where the daemon is.
pub(crate) struct Client {
    host: String,
}

impl Client {
    pub(crate) fn new(host: Option<String>) -> anyhow::Result<Self> {
        let from_env = || ["SKEP_HOST", "DOCKER_HOST"].iter().find_map(|name| std::env::var(name).ok());
        let host = host.or_else(from_env).unwrap_or_else(|| DEFAULT_HOST.to_owned());
        if !host.starts_with("unix://") && !host.starts_with("tcp://") {
            bail!("host {host:?} cannot be read: write unix://PATH or tcp://HOST:PORT");
        }
        Ok(Self { host })
    }

    /// Sends a request; an error answer becomes an error.
    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<Response<Incoming>> {
        let bytes = Bytes::from(body.map(Value::to_string).unwrap_or_default());
        self.send_bytes(method, path, "application/json", bytes).await
    }

    /// As [`send`](Self::send), with any body.
    pub(crate) async fn send_bytes(
        &self,
        method: Method,
        path: &str,
        kind: &str,
        body: Bytes,
    ) -> anyhow::Result<Response<Incoming>> {
        self.send_request(Request::builder().method(method).header("content-type", kind), path, body).await
    }

    /// As [`send`](Self::send), with any headers and body.
    pub(crate) async fn send_request(
        &self,
        request: Builder,
        path: &str,
        body: Bytes,
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
        let response = self.try_send(request, path, Bytes::from(body.to_string())).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(refusal(response).await?);
        }
        Ok(hyper::upgrade::on(response).await?)
    }

    async fn try_send(&self, request: Builder, path: &str, body: Bytes) -> anyhow::Result<Response<Incoming>> {
        let request = request.uri(format!("{API}{path}")).header("host", "skep").body(Full::new(body))?;
        let exchanged = async {
            if let Some(socket) = self.host.strip_prefix("unix://") {
                exchange(TokioIo::new(UnixStream::connect(socket).await?), request).await
            } else {
                let addr = self.host.trim_start_matches("tcp://");
                exchange(TokioIo::new(TcpStream::connect(addr).await?), request).await
            }
        };
        exchanged.await.with_context(|| {
            format!(
                "the daemon at {} is not reached: is it running ('skep daemon'), and may you use its socket?",
                self.host
            )
        })
    }

    async fn json(&self, method: Method, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        read_json(self.send(method, path, body).await?).await
    }

    pub(crate) async fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.json(Method::GET, path, None).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        self.json(Method::POST, path, Some(body)).await
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
        self.send_request(request, path, Bytes::from(body.to_string())).await
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
    Ok(anyhow::anyhow!(message.unwrap_or_else(|| format!("the daemon answered {status}"))))
}

async fn exchange<I>(io: I, request: Request<Full<Bytes>>) -> anyhow::Result<Response<Incoming>>
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await?;
    tokio::spawn(async move { drop(connection.with_upgrades().await) });
    Ok(sender.send_request(request).await?)
}

/// Escapes a value for a query.
pub(crate) fn escape(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~');
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}
