// Prepares many protein files in a job array of Nextflow: every job reads its part of them, the last one merges.
// nextflow run main.nf --proteins /data/uniref --out /data/dataset --parts 20
// Both paths are absolute, and visible to all jobs. A part that failed goes on where it stopped.

params.proteins = null
params.out = null
params.parts = 20

process READ_PART {
    cpus 2
    errorStrategy 'retry'
    maxRetries 2

    input:
    val part

    output:
    val part

    script:
    """
    protlm prep ${params.proteins} --out ${params.out} --part ${part}/${params.parts} --workers ${task.cpus}
    """
}

process MERGE_PARTS {
    cpus 8

    input:
    val parts

    output:
    path 'dataset.txt'

    script:
    """
    protlm prep ${params.proteins} --out ${params.out} --merge --workers ${task.cpus}
    echo ${params.out} > dataset.txt
    """
}

workflow {
    parts = Channel.of(1..params.parts)
    READ_PART(parts)
    MERGE_PARTS(READ_PART.out.collect())
}
