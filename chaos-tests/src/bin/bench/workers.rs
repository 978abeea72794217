//! What connected workers cost a manager: many that only hold their session.

use std::sync::Arc;
use std::time::Duration;

use skep_api::grpc::dispatcher_client::DispatcherClient;
use skep_api::grpc::node_ca_client::NodeCaClient;
use skep_api::grpc::{CertificateRequest, Heartbeat, Hello, ManagerMessage, WorkerMessage, worker_message};
use skep_api::{NodeDescription, encoding};
use skep_chaos_tests::Rig;
use skep_manager::transport::{Channels, channel};
use skep_pki::{PendingIdentity, TlsIdentity, pinned_client_config};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::kilobytes;
use crate::peer::{Maker, Peer};

const MANAGER: &str = "10.77.0.1:2377";
const BEAT_EVERY: Duration = Duration::from_secs(1);
/// Long enough that the manager has given back what the joining took.
const SETTLE: Duration = Duration::from_secs(25);

pub(crate) fn workers() {
    const WORKERS: u32 = 500;
    let rig = Rig::swarm(2, 1);
    let manager = Peer::of(rig.host(1), Maker::Skep);
    let token = rig.host(1).ok(&["swarm", "join-token", "-q", "worker"]).trim().to_owned();
    rig.host(2).within_network(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            // The first few bring in what is needed once.
            for number in 0..10 {
                tokio::spawn(hold(join(&token, number).await));
            }
            tokio::time::sleep(SETTLE).await;
            let before = kilobytes(&manager.daemon_pids(), "Rss:");
            for number in 10..10 + WORKERS {
                tokio::spawn(hold(join(&token, number).await));
            }
            tokio::time::sleep(SETTLE).await;
            let after = kilobytes(&manager.daemon_pids(), "Rss:");
            let each = (after - before) / f64::from(WORKERS);
            println!("{:<58} {each:.1} kB ({before:.0} kB before, {after:.0} kB after)", "manager, for each worker");
            let nodes = manager.ask("/nodes").unwrap_or_default();
            let all = nodes.as_array().map_or(&[][..], Vec::as_slice);
            let ready = all.iter().filter(|node| node["Status"]["State"] == "ready").count();
            assert_eq!(ready as u32, WORKERS + 12, "all of them are there");
        });
    });
}

type Session = (mpsc::Sender<WorkerMessage>, Streaming<ManagerMessage>);

/// Beats, and takes what the manager says.
async fn hold((sender, mut from_manager): Session) {
    loop {
        send(&sender, worker_message::Kind::Heartbeat(Heartbeat {})).await;
        while let Ok(message) = tokio::time::timeout(BEAT_EVERY, from_manager.message()).await {
            message.expect("the session goes on").expect("the session goes on");
        }
    }
}

async fn send(sender: &mpsc::Sender<WorkerMessage>, kind: worker_message::Kind) {
    sender.send(WorkerMessage { kind: Some(kind) }).await.expect("the session is open");
}

/// A new node with a session of its own.
async fn join(token: &str, number: u32) -> Session {
    let (config, _) = pinned_client_config(&[b"h2"]).expect("a configuration");
    let pending = PendingIdentity::generate().expect("a key");
    let request = CertificateRequest {
        csr_pem: pending.request_pem().expect("a request").into_bytes(),
        join_token: token.to_owned(),
        availability: String::new(),
    };
    let mut authority = NodeCaClient::new(channel(MANAGER, Arc::new(config)));
    let issued = authority.issue_certificate(request).await.expect("a certificate").into_inner();
    let text = |bytes| String::from_utf8(bytes).expect("PEM is text");
    let identity = pending.certified(&text(issued.certificate_pem), &text(issued.root_certificate_pem));
    let tls = TlsIdentity::new(identity.expect("an identity")).expect("a usable identity");

    let (sender, messages) = mpsc::channel(4);
    let description = NodeDescription { hostname: format!("held{number}"), ..NodeDescription::default() };
    let hello = Hello { description: encoding::encode(&description), bulk_port: 7946 };
    send(&sender, worker_message::Kind::Hello(hello)).await;
    let mut dispatcher = DispatcherClient::new(Channels::new(tls).to(MANAGER).expect("a channel"));
    let session = dispatcher.session(ReceiverStream::new(messages)).await.expect("a session").into_inner();
    (sender, session)
}
