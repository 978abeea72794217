//! Where a daemon is and how it is reached: a socket of this host's, TCP with or without TLS, or another
//! host's client by SSH.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use skep_pki::AnyServer;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::process::Command;
use tokio_rustls::TlsConnector;

const CONNECT_LIMIT: Duration = Duration::from_secs(30);
/// What is run where an SSH connection leads to.
const REMOTE_COMMAND: [&str; 3] = ["skep", "system", "dial-stdio"];

/// Bytes in both directions.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// The files of TLS, as docker's clients name them.
#[derive(Clone, Debug, Default)]
pub(crate) struct TlsFiles {
    pub(crate) ca: Option<PathBuf>,
    pub(crate) cert: Option<PathBuf>,
    pub(crate) key: Option<PathBuf>,
    /// Whether anybody is taken for the daemon.
    pub(crate) skip_verify: bool,
}

/// A daemon's place.
pub(crate) struct Endpoint {
    /// As it was written.
    host: String,
    way: Way,
}

enum Way {
    Socket(PathBuf),
    Tcp(String),
    Tls { address: String, name: ServerName<'static>, connector: TlsConnector },
    Ssh(Vec<String>),
}

impl Endpoint {
    /// Reads `unix://PATH`, `tcp://HOST:PORT` or `ssh://[USER@]HOST[:PORT]`.
    pub(crate) fn parse(host: &str, tls: Option<&TlsFiles>) -> anyhow::Result<Self> {
        let way = if let Some(path) = host.strip_prefix("unix://") {
            Way::Socket(path.into())
        } else if let Some(address) = host.strip_prefix("tcp://") {
            let address = address.trim_end_matches('/');
            match tls {
                None => Way::Tcp(address.to_owned()),
                Some(files) => {
                    let name = address.rsplit_once(':').map_or(address, |(name, _)| name).trim_matches(['[', ']']);
                    let name = ServerName::try_from(name.to_owned()).with_context(|| format!("host {host:?}"))?;
                    let connector = TlsConnector::from(Arc::new(files.config()?));
                    Way::Tls { address: address.to_owned(), name, connector }
                }
            }
        } else if let Some(target) = host.strip_prefix("ssh://") {
            Way::Ssh(ssh_arguments(target).with_context(|| format!("host {host:?} cannot be read"))?)
        } else {
            bail!("host {host:?} cannot be read: write unix://PATH, tcp://HOST:PORT or ssh://[USER@]HOST[:PORT]");
        };
        Ok(Self { host: host.to_owned(), way })
    }

    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    pub(crate) fn socket(&self) -> Option<&Path> {
        if let Way::Socket(path) = &self.way { Some(path) } else { None }
    }

    pub(crate) async fn connect(&self) -> anyhow::Result<Box<dyn Stream>> {
        let connected = tokio::time::timeout(CONNECT_LIMIT, self.way.connect()).await;
        connected.map_err(|_| anyhow::anyhow!("no answer within {CONNECT_LIMIT:?}"))?
    }
}

impl Way {
    async fn connect(&self) -> anyhow::Result<Box<dyn Stream>> {
        Ok(match self {
            Self::Socket(path) => Box::new(UnixStream::connect(path).await?),
            Self::Tcp(address) => Box::new(TcpStream::connect(address).await?),
            Self::Tls { address, name, connector } => {
                let stream = TcpStream::connect(address).await?;
                Box::new(connector.connect(name.clone(), stream).await?)
            }
            Self::Ssh(arguments) => {
                let mut ssh = Command::new("ssh");
                ssh.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
                let mut child = ssh.spawn().context("ssh cannot be run: is it installed?")?;
                let (input, output) = child.stdin.take().zip(child.stdout.take()).context("ssh has no streams")?;
                // It ends with its streams, and is waited for so that it leaves nothing behind.
                tokio::spawn(async move { drop(child.wait().await) });
                Box::new(tokio::io::join(output, input))
            }
        })
    }
}

fn ssh_arguments(target: &str) -> anyhow::Result<Vec<String>> {
    let target = target.trim_end_matches('/');
    let (user, place) = target.rsplit_once('@').map_or((None, target), |(user, place)| (Some(user), place));
    let (host, port) = match place.rsplit_once(':') {
        Some((host, port)) if !host.ends_with(':') && !place.ends_with(']') => (host, Some(port)),
        _ => (place, None),
    };
    // What begins with a dash would be an option of ssh's.
    let plain = |text: &str| !text.is_empty() && !text.starts_with('-');
    if !plain(host) || user.is_some_and(|user| !plain(user)) || place.contains('/') {
        bail!("write ssh://[USER@]HOST[:PORT], without a path");
    }
    let mut arguments = vec!["-o".to_owned(), format!("ConnectTimeout={}", CONNECT_LIMIT.as_secs()), "-T".to_owned()];
    if let Some(user) = user {
        arguments.extend(["-l".to_owned(), user.to_owned()]);
    }
    if let Some(port) = port {
        let port: u16 = port.parse().with_context(|| format!("{port:?} is no port"))?;
        arguments.extend(["-p".to_owned(), port.to_string()]);
    }
    arguments.extend(["--".to_owned(), host.trim_matches(['[', ']']).to_owned()]);
    arguments.extend(REMOTE_COMMAND.map(str::to_owned));
    Ok(arguments)
}

impl TlsFiles {
    /// The files that are in a directory under docker's names.
    pub(crate) fn in_dir(dir: &Path) -> Self {
        let there = |name: &str| Some(dir.join(name)).filter(|path| path.exists());
        Self { ca: there("ca.pem"), cert: there("cert.pem"), key: there("key.pem"), skip_verify: false }
    }

    fn config(&self) -> anyhow::Result<ClientConfig> {
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
        let builder = if self.skip_verify {
            builder.dangerous().with_custom_certificate_verifier(AnyServer::new(provider))
        } else {
            let ca = self.ca.as_ref().context(
                "TLS needs the certificate of the CA that the daemon's is from: give --tlscacert, or ca.pem in \
                 DOCKER_CERT_PATH",
            )?;
            let mut roots = RootCertStore::empty();
            for certificate in CertificateDer::pem_file_iter(ca).with_context(|| unreadable(ca))? {
                roots.add(certificate.with_context(|| unreadable(ca))?).with_context(|| unreadable(ca))?;
            }
            builder.with_root_certificates(roots)
        };
        match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => {
                let chain = CertificateDer::pem_file_iter(cert).with_context(|| unreadable(cert))?;
                let chain = chain.collect::<Result<Vec<_>, _>>().with_context(|| unreadable(cert))?;
                let key = PrivateKeyDer::from_pem_file(key).with_context(|| unreadable(key))?;
                Ok(builder.with_client_auth_cert(chain, key)?)
            }
            (None, None) => Ok(builder.with_no_client_auth()),
            _ => bail!("a client's certificate and its key go together: give --tlscert and --tlskey, or neither"),
        }
    }
}

fn unreadable(path: &Path) -> String {
    format!("{} cannot be used", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ssh_is_told_who_where_and_what() {
        let told = |target: &str| ssh_arguments(target).map(|all| all[3..].join(" "));
        assert_eq!(told("bee@hive:2222").unwrap(), "-l bee -p 2222 -- hive skep system dial-stdio");
        assert_eq!(told("hive/").unwrap(), "-- hive skep system dial-stdio");
        assert_eq!(told("[fd00::1]:22").unwrap(), "-p 22 -- fd00::1 skep system dial-stdio");
        for wrong in ["", "-oProxyCommand=x", "bee@-x", "hive:port", "hive/path", "-l@hive"] {
            assert!(told(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_place_that_cannot_be_read_is_named() {
        let error = |host: &str| Endpoint::parse(host, None).err().map(|error| format!("{error:#}")).unwrap();
        assert!(error("http://x").contains("http://x"));
        assert!(error("ssh://-x").contains("ssh://-x"));
        let tls = TlsFiles::default();
        let error = Endpoint::parse("tcp://hive:2376", Some(&tls)).err().unwrap().to_string();
        assert!(error.contains("--tlscacert"), "{error}");
    }
}
