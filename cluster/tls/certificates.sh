#!/usr/bin/env bash
# Certificates for Ray's own traffic (gRPC between nodes, drivers and workers), where the network between them is not yours.
#
#   certificates.sh authority DIRECTORY                   once: the authority of this cluster (ca.crt, ca.key)
#   certificates.sh node DIRECTORY NAME ADDRESS ...       for each machine: NAME.crt, NAME.key for its addresses and names
#   certificates.sh environment DIRECTORY NAME            prints what `ray start`, drivers and jobs need in their environment
#
# Keep ca.key off the nodes: who has it makes nodes. Copy ca.crt and the node's own two files to each machine. Both sides of
# a connection show a certificate of this authority; a machine without one neither joins nor connects as a driver.
# Not covered: the dashboard and job server (HTTP: reach them by an SSH tunnel), NCCL and gloo. Ray's own figures: calls
# get slower by what TLS costs; gradients do not go this way.
set -euo pipefail
umask 077

AUTHORITY_DAYS=3650
NODE_DAYS=365

refuse() {
    echo "$1" >&2
    exit 2
}

usage() { refuse "usage: $0 authority DIRECTORY | node DIRECTORY NAME ADDRESS ... | environment DIRECTORY NAME"; }

authority() {
    mkdir -p "$1"
    [[ ! -e $1/ca.key ]] || refuse "$1/ca.key exists: a new authority would lock out every node of this one"
    openssl req -x509 -newkey rsa:3072 -nodes -sha256 -days "$AUTHORITY_DAYS" -subj "/CN=ftray cluster authority" \
        -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign \
        -keyout "$1/ca.key" -out "$1/ca.crt" 2>/dev/null
    echo "made: $1/ca.crt (for every machine), $1/ca.key (for this one alone)"
}

node() {
    local directory=$1 name=$2 names="DNS:localhost,IP:127.0.0.1" address
    shift 2
    [[ $name =~ ^[a-z0-9][a-z0-9._-]*$ && $name != ca ]] || refuse "NAME: '$name': lower-case letters, digits, '.', '_', '-'"
    [[ -f $directory/ca.key ]] || refuse "$directory/ca.key is missing: $0 authority $directory"
    for address in "$@"; do
        if [[ $address =~ ^[0-9.]+$ || $address == *:* ]]; then
            names+=",IP:$address"
        elif [[ $address =~ ^[A-Za-z0-9.-]+$ ]]; then
            names+=",DNS:$address"
        else
            refuse "ADDRESS: '$address' is neither an address nor a host's name"
        fi
    done
    local new=$directory/.$name.new
    trap 'rm -f "$new".*' RETURN
    openssl req -newkey rsa:3072 -nodes -subj "/CN=$name" -keyout "$new.key" 2>/dev/null |
        openssl x509 -req -sha256 -days "$NODE_DAYS" -CA "$directory/ca.crt" -CAkey "$directory/ca.key" -CAcreateserial \
            -extfile <(printf '%s\n' "subjectAltName=$names" "basicConstraints=CA:FALSE" \
                "keyUsage=digitalSignature,keyEncipherment" "extendedKeyUsage=serverAuth,clientAuth") \
            -out "$new.crt" 2>/dev/null || { rm -f "$new".*; refuse "ADDRESS: openssl takes none of $names"; }
    openssl verify -CAfile "$directory/ca.crt" "$new.crt" >/dev/null
    mv "$new.key" "$directory/$name.key"
    mv "$new.crt" "$directory/$name.crt"
    echo "made: $directory/$name.crt, $directory/$name.key for $names, until $(date -d "+$NODE_DAYS days" +%F)"
}

environment() {
    local directory
    directory=$(realpath "$1")
    [[ -f $directory/$2.key ]] || refuse "$directory/$2.key is missing: $0 node $1 $2 ADDRESS ..."
    printf 'export %s\n' RAY_USE_TLS=1 "RAY_TLS_CA_CERT=$directory/ca.crt" "RAY_TLS_SERVER_CERT=$directory/$2.crt" \
        "RAY_TLS_SERVER_KEY=$directory/$2.key"
}

case ${1:-}-$# in
authority-2) authority "$2" ;;
node-[4-9] | node-[1-9][0-9]) node "${@:2}" ;;
environment-3) environment "$2" "$3" ;;
*) usage ;;
esac
