//! Who is at the other end of a connection: read from its certificate, never from what it says.

use std::time::SystemTime;

use rustls_pki_types::CertificateDer;
use skep_api::{NodeId, NodeRole, Timestamp};
use x509_parser::prelude::{FromDer as _, X509Certificate};
use x509_parser::x509::X509Name;

use crate::ca::Subject;

/// A verified peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerIdentity {
    pub subject: Subject,
    pub not_before: Timestamp,
    pub not_after: Timestamp,
}

/// A certificate that names no node of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerIdentityError {
    #[error("the certificate cannot be read")]
    Unreadable,
    #[error("the certificate's subject names no node, role and swarm")]
    Subject,
}

impl PeerIdentity {
    /// Reads the subject of a certificate whose chain TLS has verified.
    pub fn from_certificate(certificate: &CertificateDer<'_>) -> Result<Self, PeerIdentityError> {
        let (_, certificate) = X509Certificate::from_der(certificate).map_err(|_| PeerIdentityError::Unreadable)?;
        let subject = read_subject(certificate.subject()).ok_or(PeerIdentityError::Subject)?;
        let time = |seconds: i64| Timestamp::from_nanos(seconds.saturating_mul(1_000_000_000));
        Ok(Self {
            subject,
            not_before: time(certificate.validity().not_before.timestamp()),
            not_after: time(certificate.validity().not_after.timestamp()),
        })
    }

    #[must_use]
    pub const fn node(&self) -> NodeId {
        self.subject.node
    }

    #[must_use]
    pub const fn role(&self) -> NodeRole {
        self.subject.role
    }

    /// Whether the certificate is still good at `now`: connections may outlive it.
    #[must_use]
    pub fn is_valid_at(&self, now: SystemTime) -> bool {
        let now = Timestamp::from_system(now);
        self.not_before <= now && now < self.not_after
    }
}

fn read_subject(name: &X509Name<'_>) -> Option<Subject> {
    let role = name.iter_organizational_unit().next()?.as_str().ok()?;
    Some(Subject {
        node: name.iter_common_name().next()?.as_str().ok()?.parse().ok()?,
        role: NodeRole::from_organizational_unit(role)?,
        cluster: name.iter_organization().next()?.as_str().ok()?.parse().ok()?,
    })
}
