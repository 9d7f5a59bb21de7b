"""`lowrank-ds doctor`: what is wrong with the processes of a job, before it trains.

Every rank tells facts about itself through the launcher's store, rank 0 compares them; then all ranks join a process
group and time its links. A store needs less than a process group: it also works where ranks or links are missing.

    command   the command line, and who waits for whom    places    who is where: hosts, devices, clocks, versions
    facts     what a rank can say of itself               settings  environment variables, and known traps
    numbers   draws and a step that must agree            links     what the measured times say
    wire      the store and the process group             findings  problems and warnings, differences between ranks
    report    text
"""
