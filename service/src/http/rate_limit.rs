//! Extractors that count a request against a rate limit, by user after a `Caller`, else by client address.

use salvo::extract::{Extractible, Metadata};
use salvo::http::StatusCode;
use salvo::http::header::RETRY_AFTER;
use salvo::{Depot, Request};
use salvo_oapi::{Components, EndpointArgRegister, Operation};

use super::caller::Caller;
use super::client_ip::{client_ip, counted_client};
use super::error::{self, Error};
use super::middleware::app;
use crate::security::limits::Limit;

/// Declares an extractor that counts the request against a limit before its body is read.
macro_rules! permit {
    ($name:ident, $limit:expr, $description:literal) => {
        #[doc = $description]
        #[derive(Debug)]
        pub(super) struct $name;

        impl<'ex> Extractible<'ex> for $name {
            fn metadata() -> &'static Metadata {
                static METADATA: Metadata = Metadata::new(stringify!($name));
                &METADATA
            }

            #[expect(refining_impl_trait, reason = "the concrete error is the more useful promise")]
            async fn extract(req: &'ex mut Request, depot: &'ex mut Depot) -> Result<Self, Error> {
                let app = app(depot)?;
                let subject = match Caller::of(depot) {
                    Some(caller) => caller.id.simple().to_string(),
                    None => {
                        client_ip(req, &app.config.trusted_proxies).map(counted_client).unwrap_or_default()
                    }
                };
                app.limits.check($limit, &subject).await?;
                Ok(Self)
            }
        }

        impl EndpointArgRegister for $name {
            fn register(components: &mut Components, operation: &mut Operation, _arg: &str) {
                let status = StatusCode::TOO_MANY_REQUESTS;
                error::document(components, operation, status, $description, &[RETRY_AFTER]);
            }
        }
    };
}

permit!(LoginPermit, Limit::Login, "Over LOGIN_RATE_LIMIT_PER_MINUTE for this client address");
permit!(RegisterPermit, Limit::Register, "Over REGISTER_RATE_LIMIT_PER_MINUTE for this client address");
// Extracted after the `Caller`, whose messages it counts.
permit!(
    SendPermit,
    Limit::Send,
    "Over SEND_RATE_LIMIT_PER_MINUTE or NEW_CONVERSATIONS_PER_HOUR for this user"
);
