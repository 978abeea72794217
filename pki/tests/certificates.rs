//! Certificates as the CA makes them, and handshakes between nodes, in memory.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::pki_types::{ServerName, UnixTime};
use rustls::{ClientConnection, ServerConnection};
use skep_api::{ClusterId, NodeId, NodeRole};
use skep_pki::{NodeIdentity, PendingIdentity, RootAuthority, Subject, TlsIdentity, pinned_client_config};

const DAY: Duration = Duration::from_secs(24 * 3600);

fn subject(node: u128, role: NodeRole) -> Subject {
    Subject { node: NodeId::from_u128(node), role, cluster: ClusterId::from_u128(1) }
}

fn identity(root: &RootAuthority, node: u128, role: NodeRole, now: SystemTime) -> NodeIdentity {
    let pending = PendingIdentity::generate().unwrap();
    let request = pending.request_pem().unwrap();
    let certificate = root.sign(&request, subject(node, role), DAY, now).unwrap();
    pending.certified(&certificate, root.certificate_pem()).unwrap()
}

/// Carries a handshake through; the server's view of the client comes out.
fn handshake(client: &Arc<TlsIdentity>, server: &Arc<TlsIdentity>, name: &str) -> Result<bool, rustls::Error> {
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let client_config = Arc::new(client.client_config(&[b"h2"]).unwrap());
    let server_config = Arc::new(server.server_config(&[b"h2"]).unwrap());
    let mut client = ClientConnection::new(client_config, name).unwrap();
    let mut server = ServerConnection::new(server_config).unwrap();
    for _ in 0..4 {
        let mut wire = Vec::new();
        client.write_tls(&mut wire).unwrap();
        server.read_tls(&mut wire.as_slice()).unwrap();
        server.process_new_packets()?;
        let mut wire = Vec::new();
        server.write_tls(&mut wire).unwrap();
        client.read_tls(&mut wire.as_slice()).unwrap();
        client.process_new_packets()?;
    }
    client.writer().write_all(b"hello").unwrap();
    let mut wire = Vec::new();
    client.write_tls(&mut wire).unwrap();
    server.read_tls(&mut wire.as_slice()).unwrap();
    server.process_new_packets()?;
    let mut text = [0; 5];
    server.reader().read_exact(&mut text).unwrap();
    Ok(server.peer_certificates().is_some())
}

#[test]
fn the_subject_is_the_cas_and_not_the_requests() {
    let now = SystemTime::now();
    let (root, _) = RootAuthority::generate(now).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let mut wish = rcgen::CertificateParams::new(vec!["swarm-manager".into()]).unwrap();
    wish.distinguished_name.push(rcgen::DnType::OrganizationalUnitName, "swarm-manager");
    wish.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let request = wish.serialize_request(&key).unwrap().pem().unwrap();
    let certificate = root.sign(&request, subject(7, NodeRole::Worker), DAY, now).unwrap();
    let (_, pem) = x509_parser::pem::parse_x509_pem(certificate.as_bytes()).unwrap();
    let parsed = pem.parse_x509().unwrap();
    assert!(!parsed.is_ca());
    let peer = skep_pki::PeerIdentity::from_certificate(&pem.contents.into()).unwrap();
    assert_eq!(peer.subject, subject(7, NodeRole::Worker));
}

#[test]
fn nodes_of_one_swarm_know_each_other_and_no_others() {
    let now = SystemTime::now();
    let (ours, _) = RootAuthority::generate(now).unwrap();
    let (theirs, _) = RootAuthority::generate(now).unwrap();
    let tls = |root, node, role, now| TlsIdentity::new(identity(root, node, role, now)).unwrap();
    let manager = tls(&ours, 1, NodeRole::Manager, now);
    let worker = tls(&ours, 2, NodeRole::Worker, now);
    let stranger = tls(&theirs, 3, NodeRole::Manager, now);
    let expired = tls(&ours, 4, NodeRole::Manager, now - 3 * DAY);
    assert_eq!(handshake(&worker, &manager, "swarm-manager"), Ok(true));
    assert!(handshake(&manager, &worker, "swarm-manager").is_err(), "a worker is no manager");
    assert_eq!(handshake(&manager, &worker, &skep_pki::ca::tls_name(NodeId::from_u128(2))), Ok(true));
    assert!(handshake(&stranger, &manager, "swarm-manager").is_err());
    assert!(handshake(&worker, &stranger, "swarm-manager").is_err());
    assert!(handshake(&expired, &manager, "swarm-manager").is_err());
    assert!(handshake(&worker, &expired, "swarm-manager").is_err());
    expired.replace(identity(&ours, 4, NodeRole::Manager, now)).unwrap();
    assert_eq!(handshake(&expired, &manager, "swarm-manager"), Ok(true), "a renewed certificate takes effect");
}

#[test]
fn a_joining_node_trusts_the_pinned_root_alone() {
    let now = SystemTime::now();
    let (ours, _) = RootAuthority::generate(now).unwrap();
    let (theirs, _) = RootAuthority::generate(now).unwrap();
    let server = TlsIdentity::new(identity(&theirs, 1, NodeRole::Manager, now)).unwrap();
    let (config, seen) = pinned_client_config(&[b"h2"]).unwrap();
    let name = ServerName::try_from("swarm-manager").unwrap();
    let mut client = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut server = ServerConnection::new(Arc::new(server.server_config(&[b"h2"]).unwrap())).unwrap();
    for _ in 0..4 {
        let (mut up, mut down) = (Vec::new(), Vec::new());
        client.write_tls(&mut up).unwrap();
        server.read_tls(&mut up.as_slice()).unwrap();
        server.process_new_packets().unwrap();
        server.write_tls(&mut down).unwrap();
        client.read_tls(&mut down.as_slice()).unwrap();
        client.process_new_packets().unwrap();
    }
    // The man in the middle hands over the true root, but its certificate is not under it.
    let now = UnixTime::now();
    assert!(!seen.is_manager_of(ours.certificate_pem(), ours.digest(), now).unwrap());
    assert!(!seen.is_manager_of(theirs.certificate_pem(), ours.digest(), now).unwrap());
    assert!(seen.is_manager_of(theirs.certificate_pem(), theirs.digest(), now).unwrap());
}

#[test]
fn an_identity_survives_on_disk_with_its_key_closed_to_others() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("certificates");
    assert!(NodeIdentity::load(&dir, None).unwrap().is_none());
    let now = SystemTime::now();
    let (root, _) = RootAuthority::generate(now).unwrap();
    let identity = identity(&root, 9, NodeRole::Worker, now);
    identity.save(&dir, None).unwrap();
    let loaded = NodeIdentity::load(&dir, None).unwrap().unwrap();
    assert_eq!(loaded.peer.subject, subject(9, NodeRole::Worker));
    let mode = |name: &str| std::fs::metadata(dir.join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("swarm-node.key"), 0o600);
    let (early, late) = (loaded.renew_after(now, 0.0), loaded.renew_after(now, 1.0));
    assert!(early < late && late < DAY && early > Duration::from_secs(11 * 3600), "{early:?} {late:?}");
}
