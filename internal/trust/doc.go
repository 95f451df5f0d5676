// Package trust keeps the keys of a deployment on disk and does what only the
// root key may do.
//
// A directory holds, each file with mode 0600 in a directory of mode 0700:
//
//	root.key          the offline root, PKCS #8 in PEM; may be kept elsewhere,
//	                  and should be once there is something to protect
//	root.pub          its public half, PKIX in PEM
//	keyset            the newest root-signed key set, a frame
//	sign-<keyid>.key  signing keys, PKCS #8 in PEM
//	audit-<keyid>.key sealing keys (X25519), PKCS #8 in PEM: with them reports
//	                  of enforcers can be read
//	tenants.json      the tenants' digest keys
//	authority.nk      the authority's NKey seed
//
// Files are replaced whole: written beside, synced, renamed, and the directory
// synced. A key set is stored last of what belongs to a change, so that a crash
// leaves at worst a key that nothing names.
package trust
